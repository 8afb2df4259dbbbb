//! Tokens into a tree: expressions, from the loosest to the tightest.

use super::lex::Token;
use super::parse::{MAX_DEPTH, Parser};
use super::tree::{Args, Expr, Kind};
use super::{Fault, Outcome};

impl Parser {
    /// An expression over those below it. Trees are walked and dropped by recursion, so that their depth has a bound.
    pub fn node(&self, line: u32, kind: Kind) -> Outcome<Expr> {
        self.count()?;
        let many = |list: &[Expr]| list.iter().map(|e| e.depth).max().unwrap_or(0);
        let args = |a: &Args| {
            let named = a.named.iter().map(|(_, e)| e.depth).max().unwrap_or(0);
            let rest = [&a.rest, &a.rest_named].into_iter().flatten().map(|e| e.depth).max().unwrap_or(0);
            many(&a.list).max(named).max(rest)
        };
        let depth = 1 + match &kind {
            Kind::Name(_) | Kind::None | Kind::Bool(_) | Kind::Int(_) | Kind::Float(_) | Kind::Str(_) => 0,
            Kind::Tuple(l) | Kind::List(l) | Kind::Concat(l) => many(l),
            Kind::Dict(pairs) => pairs.iter().map(|(k, v)| k.depth.max(v.depth)).max().unwrap_or(0),
            Kind::Attr(e, _) | Kind::Neg(e) | Kind::Pos(e) | Kind::Not(e) => e.depth,
            Kind::Item(a, b) | Kind::Binary(_, a, b) | Kind::And(a, b) | Kind::Or(a, b) => a.depth.max(b.depth),
            Kind::Slice(parts) => parts.iter().flatten().map(|e| e.depth).max().unwrap_or(0),
            Kind::Call(e, a) | Kind::Filter(e, _, a) | Kind::Test(e, _, a) => e.depth.max(args(a)),
            Kind::Compare(e, list) => list.iter().map(|(_, e)| e.depth).max().unwrap_or(0).max(e.depth),
            Kind::If(a, b, c) => a.depth.max(b.depth).max(c.as_ref().map_or(0, |c| c.depth)),
        };
        if depth > MAX_DEPTH {
            return Err(Fault::syntax(format!("an expression of more than {MAX_DEPTH} levels")).at(line));
        }
        Ok(Expr { line, depth, kind })
    }

    pub fn tuple(&mut self, parentheses: bool) -> Outcome<Expr> {
        self.tuple_of(!parentheses, Parser::expression)
    }

    /// One expression, or several with commas, which are a tuple.
    pub fn tuple_of(&mut self, some: bool, one: fn(&mut Parser) -> Outcome<Expr>) -> Outcome<Expr> {
        let line = self.line();
        let mut list = Vec::new();
        let mut several = false;
        loop {
            let ended = matches!(self.now(), Token::BlockEnd | Token::PrintEnd) || self.is_op(")");
            if ended && (several || !some) {
                break;
            }
            list.push(one(self)?);
            if !self.skip_op(",") {
                break;
            }
            several = true;
        }
        match list.pop() {
            Some(only) if !several => Ok(only),
            last => {
                list.extend(last);
                self.node(line, Kind::Tuple(list))
            }
        }
    }

    pub fn expression(&mut self) -> Outcome<Expr> {
        self.deeper(|p| {
            let line = p.line();
            let mut value = p.or()?;
            while p.skip_word("if") {
                let condition = p.or()?;
                let otherwise = if p.skip_word("else") { Some(Box::new(p.expression()?)) } else { None };
                value = p.node(line, Kind::If(Box::new(condition), Box::new(value), otherwise))?;
            }
            Ok(value)
        })
    }

    pub fn or(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let mut left = self.and()?;
        while self.skip_word("or") {
            let right = self.and()?;
            left = self.node(line, Kind::Or(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        while self.skip_word("and") {
            let right = self.not()?;
            left = self.node(line, Kind::And(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Outcome<Expr> {
        let line = self.line();
        if self.skip_word("not") {
            let value = self.deeper(Parser::not)?;
            return self.node(line, Kind::Not(Box::new(value)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let first = self.math(0)?;
        let mut list = Vec::new();
        loop {
            let op = match self.now() {
                Token::Op(o @ ("==" | "!=" | "<" | "<=" | ">" | ">=")) => *o,
                Token::Name(n) if &**n == "in" => "in",
                Token::Name(n) if &**n == "not" => match self.tokens.get(self.at + 1) {
                    Some((_, Token::Name(n))) if &**n == "in" => {
                        self.step();
                        "not in"
                    }
                    _ => break,
                },
                _ => break,
            };
            self.step();
            list.push((op, self.math(0)?));
        }
        if list.is_empty() { Ok(first) } else { self.node(line, Kind::Compare(Box::new(first), list)) }
    }

    /// Sums, joined texts, products, powers: each level of `LEVELS` binds tighter than the one before it.
    fn math(&mut self, level: usize) -> Outcome<Expr> {
        const LEVELS: [&[&str]; 4] = [&["+", "-"], &["~"], &["*", "/", "//", "%"], &["**"]];
        let Some(ops) = LEVELS.get(level) else { return self.unary(true) };
        let line = self.line();
        let mut left = self.math(level + 1)?;
        let mut joined = Vec::new();
        loop {
            let op = match self.now() {
                Token::Op(o) if ops.contains(o) => *o,
                _ => break,
            };
            self.step();
            let right = self.math(level + 1)?;
            if op == "~" {
                joined.push(right);
            } else {
                left = self.node(line, Kind::Binary(op, Box::new(left), Box::new(right)))?;
            }
        }
        if joined.is_empty() {
            return Ok(left);
        }
        joined.insert(0, left);
        self.node(line, Kind::Concat(joined))
    }

    fn unary(&mut self, filters: bool) -> Outcome<Expr> {
        let line = self.line();
        let value = if self.skip_op("-") {
            let inner = self.deeper(|p| p.unary(false))?;
            self.node(line, Kind::Neg(Box::new(inner)))?
        } else if self.skip_op("+") {
            let inner = self.deeper(|p| p.unary(false))?;
            self.node(line, Kind::Pos(Box::new(inner)))?
        } else {
            self.primary()?
        };
        let value = self.postfix(value)?;
        if filters { self.filters(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let kind = match self.now().clone() {
            Token::Name(n) => match &*n {
                "true" | "True" => Kind::Bool(true),
                "false" | "False" => Kind::Bool(false),
                "none" | "None" => Kind::None,
                _ => {
                    self.asked.push(n.clone());
                    Kind::Name(n)
                }
            },
            Token::Int(n) => Kind::Int(n),
            Token::Float(x) => Kind::Float(x),
            Token::Str(mut text) => {
                while let Some((_, Token::Str(more))) = self.tokens.get(self.at + 1) {
                    text += more;
                    self.at += 1;
                }
                Kind::Str(text.into())
            }
            Token::Op("(") => {
                self.step();
                let inner = self.deeper(|p| p.tuple(true))?;
                self.expect_op(")")?;
                return Ok(inner);
            }
            Token::Op("[") => {
                self.step();
                let list = self.listed("]", Parser::expression)?;
                return self.node(line, Kind::List(list));
            }
            Token::Op("{") => {
                self.step();
                let pairs = self.listed("}", |p| {
                    let key = p.expression()?;
                    p.expect_op(":")?;
                    Ok((key, p.expression()?))
                })?;
                return self.node(line, Kind::Dict(pairs));
            }
            other => return self.fail(format!("unexpected {}", other.told())),
        };
        self.step();
        self.node(line, kind)
    }

    fn listed<T>(&mut self, end: &str, one: impl Fn(&mut Parser) -> Outcome<T>) -> Outcome<Vec<T>> {
        let mut list = Vec::new();
        while !self.skip_op(end) {
            if !list.is_empty() {
                self.expect_op(",")?;
                if self.skip_op(end) {
                    break;
                }
            }
            list.push(one(self)?);
        }
        Ok(list)
    }

    fn postfix(&mut self, mut value: Expr) -> Outcome<Expr> {
        loop {
            let line = self.line();
            value = if self.skip_op(".") {
                match self.now().clone() {
                    Token::Name(n) => {
                        self.step();
                        self.node(line, Kind::Attr(Box::new(value), n))?
                    }
                    Token::Int(n) => {
                        self.step();
                        let index = self.node(line, Kind::Int(n))?;
                        self.node(line, Kind::Item(Box::new(value), Box::new(index)))?
                    }
                    other => return self.fail(format!("expected a name or a number, found {}", other.told())),
                }
            } else if self.skip_op("[") {
                let mut list = self.listed("]", Parser::index)?;
                let index = match (list.pop(), list.is_empty()) {
                    (Some(index), true) => index,
                    (last, _) => {
                        list.extend(last);
                        self.node(line, Kind::Tuple(list))?
                    }
                };
                self.node(line, Kind::Item(Box::new(value), Box::new(index)))?
            } else if self.is_op("(") {
                let args = self.args()?;
                self.node(line, Kind::Call(Box::new(value), args))?
            } else {
                return Ok(value);
            };
        }
    }

    /// What stands in an item's brackets.
    fn index(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let mut parts = [None, None, None];
        let ended = |p: &Parser| p.is_op(":") || p.is_op("]") || p.is_op(",");
        if !ended(self) {
            let first = self.expression()?;
            if !self.is_op(":") {
                return Ok(first);
            }
            parts[0] = Some(Box::new(first));
        }
        self.expect_op(":")?;
        for part in &mut parts[1..] {
            if !ended(self) {
                *part = Some(Box::new(self.expression()?));
            }
            if !self.skip_op(":") {
                break;
            }
        }
        self.node(line, Kind::Slice(parts))
    }

    pub fn filters(&mut self, mut value: Expr) -> Outcome<Expr> {
        loop {
            let line = self.line();
            value = if self.skip_op("|") {
                self.filter(value)?
            } else if self.skip_word("is") {
                self.test(value)?
            } else if self.is_op("(") {
                let args = self.args()?;
                self.node(line, Kind::Call(Box::new(value), args))?
            } else {
                return Ok(value);
            };
        }
    }

    pub fn filter(&mut self, value: Expr) -> Outcome<Expr> {
        let line = self.line();
        let name = self.name()?;
        let args = if self.is_op("(") { self.args()? } else { Args::default() };
        self.node(line, Kind::Filter(Box::new(value), name, args))
    }

    fn test(&mut self, value: Expr) -> Outcome<Expr> {
        let line = self.line();
        let not = self.skip_word("not");
        let name = self.name()?;
        let argument = match self.now() {
            Token::Name(n) => !["else", "or", "and", "if", "recursive"].contains(&&**n),
            Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{") => true,
            _ => false,
        };
        let args = if self.is_op("(") {
            self.args()?
        } else if argument && self.is_word("is") {
            return self.fail("tests cannot follow each other");
        } else if argument {
            let only = self.primary()?;
            let only = self.postfix(only)?;
            Args { list: vec![only], ..Args::default() }
        } else {
            Args::default()
        };
        let test = self.node(line, Kind::Test(Box::new(value), name, args))?;
        if not { self.node(line, Kind::Not(Box::new(test))) } else { Ok(test) }
    }

    fn args(&mut self) -> Outcome<Args> {
        self.expect_op("(")?;
        let mut args = Args::default();
        let mut first = true;
        while !self.skip_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.skip_op(")") {
                    break;
                }
            }
            first = false;
            if self.skip_op("*") {
                args.rest = Some(Box::new(self.expression()?));
            } else if self.skip_op("**") {
                args.rest_named = Some(Box::new(self.expression()?));
            } else if matches!(self.now(), Token::Name(_)) && self.next_is("=") {
                let name = self.name()?;
                self.step();
                args.named.push((name, self.expression()?));
            } else if args.named.is_empty() && args.rest.is_none() && args.rest_named.is_none() {
                args.list.push(self.expression()?);
            } else {
                return self.fail("an argument without a name behind one with a name");
            }
        }
        Ok(args)
    }
}
