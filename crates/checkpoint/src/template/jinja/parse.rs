//! Tokens into a tree, by Jinja's grammar: statements.

use std::cell::Cell;
use std::sync::Arc;

use super::lex::{Token, tokens};
use super::tree::{BLOCK, Expr, ForNode, Kind, MacroNode, Stmt, StmtKind, Target};
use super::{Fault, Outcome};

/// Expressions and blocks within each other.
pub(super) const MAX_DEPTH: usize = 100;

/// Statements and expressions of a template: each takes a hundred bytes and more.
const MAX_NODES: usize = 200_000;

/// The tree of a template.
pub(super) fn parse(source: &str) -> Outcome<Vec<Stmt>> {
    let tokens = tokens(source)?;
    let mut p = Parser { tokens, at: 0, nesting: 0, nodes: Cell::new(0), loops: 0, asked: Vec::new() };
    p.statements(&[])
}

pub(super) struct Parser {
    pub tokens: Vec<(u32, Token)>,
    pub at: usize,
    nesting: usize,
    nodes: Cell<usize>,
    /// Loops around, within the same macro.
    loops: usize,
    /// Names used so far, for what a macro asks for.
    pub asked: Vec<Arc<str>>,
}

impl Parser {
    pub fn now(&self) -> &Token {
        &self.tokens[self.at].1
    }

    pub fn next_is(&self, op: &str) -> bool {
        matches!(self.tokens.get(self.at + 1), Some((_, Token::Op(o))) if *o == op)
    }

    pub fn line(&self) -> u32 {
        self.tokens[self.at].0
    }

    pub fn step(&mut self) {
        // The last token is the end, which stays.
        self.at = (self.at + 1).min(self.tokens.len() - 1);
    }

    pub fn fail<T>(&self, what: impl Into<String>) -> Outcome<T> {
        Err(Fault::syntax(what).at(self.line()))
    }

    /// Counts a statement or an expression.
    pub fn count(&self) -> Outcome<()> {
        self.nodes.set(self.nodes.get() + 1);
        if self.nodes.get() > MAX_NODES {
            return self.fail(format!("the template is too large: it has more than {MAX_NODES} parts"));
        }
        Ok(())
    }

    pub fn is_op(&self, op: &str) -> bool {
        matches!(self.now(), Token::Op(o) if *o == op)
    }

    pub fn is_word(&self, word: &str) -> bool {
        matches!(self.now(), Token::Name(n) if &**n == word)
    }

    pub fn skip_op(&mut self, op: &str) -> bool {
        let is = self.is_op(op);
        if is {
            self.step();
        }
        is
    }

    pub fn skip_word(&mut self, word: &str) -> bool {
        let is = self.is_word(word);
        if is {
            self.step();
        }
        is
    }

    pub fn expect_op(&mut self, op: &str) -> Outcome<()> {
        if self.skip_op(op) {
            return Ok(());
        }
        self.fail(format!("expected '{op}', found {}", self.now().told()))
    }

    fn expect(&mut self, token: &Token) -> Outcome<()> {
        if self.now() != token {
            return self.fail(format!("expected {}, found {}", token.told(), self.now().told()));
        }
        self.step();
        Ok(())
    }

    pub fn name(&mut self) -> Outcome<Arc<str>> {
        match self.now() {
            Token::Name(n) => {
                let n = n.clone();
                self.step();
                Ok(n)
            }
            other => self.fail(format!("expected a name, found {}", other.told())),
        }
    }

    pub fn deeper<T>(&mut self, parse: impl FnOnce(&mut Parser) -> Outcome<T>) -> Outcome<T> {
        self.nesting += 1;
        if self.nesting > MAX_DEPTH {
            return self.fail(format!("it nests more than {MAX_DEPTH} deep"));
        }
        let out = parse(self);
        self.nesting -= 1;
        out
    }

    /// Statements up to one of the words `ends`, which is left; to the end of the template where there are none.
    fn statements(&mut self, ends: &[&str]) -> Outcome<Vec<Stmt>> {
        let mut out = Vec::new();
        loop {
            let line = self.line();
            self.count()?;
            match self.now().clone() {
                Token::Text(text) => {
                    self.step();
                    out.push(Stmt { line, kind: StmtKind::Text(text) });
                }
                Token::PrintStart => {
                    self.step();
                    let value = self.tuple(false)?;
                    self.expect(&Token::PrintEnd)?;
                    out.push(Stmt { line, kind: StmtKind::Print(value) });
                }
                Token::BlockStart => {
                    self.step();
                    if ends.iter().any(|e| self.is_word(e)) {
                        return Ok(out);
                    }
                    let kind = self.deeper(Parser::statement)?;
                    self.expect(&Token::BlockEnd)?;
                    out.push(Stmt { line, kind });
                }
                Token::End if ends.is_empty() => return Ok(out),
                other => {
                    let wanted = if ends.is_empty() { String::new() } else { format!(" before {}", ends.join(" or ")) };
                    return self.fail(format!("unexpected {}{wanted}", other.told()));
                }
            }
        }
    }

    /// A block's statements behind the end of its first tag, and the word that ends it.
    fn block(&mut self, ends: &[&str]) -> Outcome<Vec<Stmt>> {
        self.skip_op(":");
        self.expect(&Token::BlockEnd)?;
        self.statements(ends)
    }

    fn whole_block(&mut self, end: &str) -> Outcome<Vec<Stmt>> {
        let body = self.block(&[end])?;
        self.step();
        Ok(body)
    }

    fn statement(&mut self) -> Outcome<StmtKind> {
        let line = self.line();
        let word = self.name()?;
        match &*word {
            "if" => self.conditions(),
            "for" => self.each(),
            "set" => self.set(),
            "macro" => {
                let name = self.name()?;
                Ok(StmtKind::Macro(self.macro_of(name, "endmacro")?))
            }
            "call" => {
                // The parameters of `caller` stand before the call.
                let start = self.asked.len();
                let params = if self.is_op("(") { self.params()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(call.kind, Kind::Call(..)) {
                    return Err(Fault::syntax("'call' needs a call").at(line));
                }
                let body = self.macro_body("endcall")?;
                Ok(StmtKind::CallBlock(call, Arc::new(self.macro_node("caller".into(), params, body, start))))
            }
            "filter" => {
                let value = self.block_filters(line)?;
                Ok(StmtKind::PrintBlock(value, self.whole_block("endfilter")?))
            }
            "with" => self.with(),
            // Marks for a trainer what the assistant wrote; for text it is what stands in it.
            "generation" => Ok(StmtKind::With(Vec::new(), self.whole_block("endgeneration")?)),
            "autoescape" => {
                let on = self.expression()?;
                if !matches!(on.kind, Kind::Bool(false)) {
                    return Err(Fault::syntax("autoescape is for HTML; a chat template has none").at(line));
                }
                Ok(StmtKind::With(Vec::new(), self.whole_block("endautoescape")?))
            }
            "break" | "continue" if self.loops == 0 => {
                Err(Fault::syntax(format!("'{word}' outside of a loop")).at(line))
            }
            "break" => Ok(StmtKind::Break),
            "continue" => Ok(StmtKind::Continue),
            "include" | "import" | "from" | "extends" | "block" => {
                Err(Fault::syntax(format!("'{word}' is about other templates; a chat template is alone")).at(line))
            }
            _ => Err(Fault::syntax(format!("unknown tag '{word}'")).at(line)),
        }
    }

    fn conditions(&mut self) -> Outcome<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let condition = self.tuple(false)?;
            branches.push((condition, self.block(&["elif", "else", "endif"])?));
            if self.skip_word("elif") {
                continue;
            }
            let otherwise = if self.skip_word("else") { self.block(&["endif"])? } else { Vec::new() };
            self.step();
            return Ok(StmtKind::If(branches, otherwise));
        }
    }

    fn each(&mut self) -> Outcome<StmtKind> {
        let target = self.target(&["in"])?;
        if !self.skip_word("in") {
            return self.fail(format!("expected 'in', found {}", self.now().told()));
        }
        // `if` behind it is the loop's own, not a condition within the expression.
        let over = self.tuple_of(true, Parser::or)?;
        let only = if self.skip_word("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_word("recursive");
        self.loops += 1;
        let body = self.block(&["endfor", "else"])?;
        self.loops -= 1;
        let otherwise = if self.skip_word("else") { self.block(&["endfor"])? } else { Vec::new() };
        self.step();
        Ok(StmtKind::For(Arc::new(ForNode { target, over, only, recursive, body, otherwise })))
    }

    fn set(&mut self) -> Outcome<StmtKind> {
        let line = self.line();
        let target = self.target(&[])?;
        if self.skip_op("=") {
            return Ok(StmtKind::Set(target, self.tuple(false)?));
        }
        let block = self.node(line, Kind::Name(BLOCK.into()))?;
        let value = self.filters(block)?;
        Ok(StmtKind::SetBlock(target, value, self.whole_block("endset")?))
    }

    fn block_filters(&mut self, line: u32) -> Outcome<Expr> {
        let block = self.node(line, Kind::Name(BLOCK.into()))?;
        let first = self.filter(block)?;
        self.filters(first)
    }

    fn with(&mut self) -> Outcome<StmtKind> {
        let mut values = Vec::new();
        while *self.now() != Token::BlockEnd {
            if !values.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.target(&[])?;
            self.expect_op("=")?;
            values.push((target, self.expression()?));
        }
        Ok(StmtKind::With(values, self.whole_block("endwith")?))
    }

    fn params(&mut self) -> Outcome<Vec<(Arc<str>, Option<Expr>)>> {
        self.expect_op("(")?;
        let mut params: Vec<(Arc<str>, Option<Expr>)> = Vec::new();
        while !self.is_op(")") {
            if !params.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.name()?;
            let default = if self.skip_op("=") { Some(self.expression()?) } else { None };
            if default.is_none() && params.iter().any(|p| p.1.is_some()) {
                return self.fail(format!("parameter '{name}' without a default behind one with a default"));
            }
            params.push((name, default));
        }
        self.step();
        Ok(params)
    }

    fn macro_body(&mut self, end: &str) -> Outcome<Vec<Stmt>> {
        let loops = std::mem::take(&mut self.loops);
        let body = self.whole_block(end)?;
        self.loops = loops;
        Ok(body)
    }

    fn macro_of(&mut self, name: Arc<str>, end: &str) -> Outcome<Arc<MacroNode>> {
        let start = self.asked.len();
        let params = self.params()?;
        let body = self.macro_body(end)?;
        Ok(Arc::new(self.macro_node(name, params, body, start)))
    }

    fn macro_node(
        &self,
        name: Arc<str>,
        params: Vec<(Arc<str>, Option<Expr>)>,
        body: Vec<Stmt>,
        start: usize,
    ) -> MacroNode {
        let asks = |word: &str| self.asked[start..].iter().any(|n| &**n == word);
        MacroNode { name, params, body, varargs: asks("varargs"), kwargs: asks("kwargs"), caller: asks("caller") }
    }

    /// What is assigned to: a name, an attribute of a namespace, or several of them.
    fn target(&mut self, ends: &[&str]) -> Outcome<Target> {
        let mut list = Vec::new();
        let mut several = false;
        loop {
            let ended = matches!(self.now(), Token::BlockEnd) || self.is_op("=") || self.is_op(")");
            if several && (ended || ends.iter().any(|e| self.is_word(e))) {
                break;
            }
            let one = if self.skip_op("(") {
                let inner = self.deeper(|p| p.target(&[]))?;
                self.expect_op(")")?;
                inner
            } else {
                let name = self.name()?;
                if ["true", "false", "none", "True", "False", "None"].contains(&&*name) {
                    return self.fail(format!("'{name}' cannot be assigned to"));
                }
                if self.skip_op(".") { Target::Attr(name, self.name()?) } else { Target::Name(name) }
            };
            list.push(one);
            if !self.skip_op(",") {
                break;
            }
            several = true;
        }
        match list.pop() {
            Some(only) if !several => Ok(only),
            last => {
                list.extend(last);
                Ok(Target::Tuple(list))
            }
        }
    }
}
