//! Runs the tree: statements into text, expressions into values.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use super::meter::{Builder, Held, Meter};
use super::tree::{Args, BLOCK, Expr, ForNode, Kind, MacroNode, Stmt, StmtKind, Target};
use super::value::{MacroValue, Namespace, Seq};
use super::{Fault, Outcome, Row, Str, Value, ops};

/// Expressions, blocks and calls within each other.
const MAX_DEPTH: usize = 250;

/// Names of one block, above those of the blocks around it.
pub(super) struct Scope {
    names: RefCell<HashMap<Arc<str>, Value>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    pub fn new(parent: Option<&Rc<Scope>>) -> Rc<Scope> {
        Rc::new(Scope { names: RefCell::default(), parent: parent.cloned() })
    }

    pub fn set(&self, name: &Arc<str>, value: Value) {
        self.names.borrow_mut().insert(name.clone(), value);
    }

    fn get(&self, name: &str) -> Option<Value> {
        let own = self.names.borrow().get(name).cloned();
        own.or_else(|| self.parent.as_ref()?.get(name))
    }
}

/// The state of a `for`, which its body knows as `loop`.
pub(super) struct Loop {
    pub row: Rc<Seq>,
    pub index: Cell<usize>,
    /// Loops of the same recursion around.
    pub level: usize,
    pub changed: RefCell<Option<Value>>,
    /// Past its end a loop keeps nothing more: chains and rings of loops could grow, which drop by recursion or never.
    pub ended: Cell<bool>,
    recursive: Option<(Arc<ForNode>, Rc<Scope>)>,
    _held: Held,
}

/// Arguments of a call.
#[derive(Default)]
pub(super) struct Given {
    pub list: Vec<Value>,
    pub named: Vec<(Arc<str>, Value)>,
}

impl Given {
    /// The arguments by the names of the parameters, in their order.
    pub fn take<const N: usize>(self, of: &str, params: [&str; N]) -> Outcome<[Option<Value>; N]> {
        let mut out = [const { None }; N];
        if self.list.len() > N {
            return Err(Fault::error(format!("{of}() takes at most {N} arguments, {} were given", self.list.len())));
        }
        for (slot, value) in out.iter_mut().zip(self.list) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            let Some(i) = params.iter().position(|p| *p == &*name) else {
                return Err(Fault::error(format!("{of}() has no parameter '{name}'")));
            };
            if out[i].replace(value).is_some() {
                return Err(Fault::error(format!("{of}() got two values for '{name}'")));
            }
        }
        Ok(out)
    }
}

/// What follows a statement.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

/// One run of a program.
pub(super) struct Machine {
    pub meter: Rc<Meter>,
    pub now: SystemTime,
    depth: Cell<usize>,
    /// Scopes and namespaces that values may hold: rings of them, and long chains, are taken apart at the end.
    scopes: RefCell<Vec<(Rc<Scope>, Held)>>,
    namespaces: RefCell<Vec<(Rc<Namespace>, Held)>>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        for (scope, _) in &*self.scopes.borrow() {
            scope.names.take();
        }
        for (namespace, _) in &*self.namespaces.borrow() {
            namespace.take();
        }
    }
}

impl Machine {
    pub fn new(meter: Rc<Meter>, now: SystemTime) -> Machine {
        Machine { meter, now, depth: Cell::new(0), scopes: RefCell::default(), namespaces: RefCell::default() }
    }

    pub fn namespace(&self, names: Vec<(Arc<str>, Value)>) -> Outcome<Value> {
        if let Some((name, _)) = names.iter().find(|(n, _)| n.starts_with('_')) {
            return Err(Fault::error(format!("a namespace has no place for '{name}'")));
        }
        let letters: usize = names.iter().map(|(n, _)| n.len()).sum();
        let held = self.meter.hold(128 + letters + names.len().saturating_mul(96))?;
        let namespace = Rc::new(RefCell::new(names.into_iter().collect::<HashMap<_, _>>()));
        self.namespaces.borrow_mut().push((namespace.clone(), held));
        Ok(Value::Namespace(namespace))
    }

    fn keep(&self, scope: &Rc<Scope>) -> Outcome<()> {
        let held = self.meter.hold(128)?;
        self.scopes.borrow_mut().push((scope.clone(), held));
        Ok(())
    }

    pub(super) fn deeper<T>(&self, run: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        self.meter.steps(1)?;
        if self.depth.get() >= MAX_DEPTH {
            return Err(Fault::error(format!("it calls itself, or nests, more than {MAX_DEPTH} deep")));
        }
        self.depth.set(self.depth.get() + 1);
        let out = run();
        self.depth.set(self.depth.get() - 1);
        out
    }

    /// Runs statements.
    pub fn block(&self, body: &[Stmt], scope: &Rc<Scope>, out: &mut Builder) -> Outcome<Flow> {
        for stmt in body {
            let flow = self.deeper(|| self.statement(&stmt.kind, scope, out)).map_err(|f| f.at(stmt.line))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&self, kind: &StmtKind, scope: &Rc<Scope>, out: &mut Builder) -> Outcome<Flow> {
        match kind {
            StmtKind::Text(text) => out.push(text)?,
            StmtKind::Print(value) => self.print(&self.eval(value, scope)?, out)?,
            StmtKind::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.eval(condition, scope)?.truth() {
                        return self.block(body, scope, out);
                    }
                }
                return self.block(otherwise, scope, out);
            }
            StmtKind::For(node) => {
                let over = self.eval(&node.over, scope)?;
                self.each(node, &over, scope, 0, out)?;
            }
            StmtKind::Set(target, value) => self.assign(target, self.eval(value, scope)?, scope)?,
            StmtKind::SetBlock(target, value, body) => {
                let value = self.filtered(value, body, scope)?;
                self.assign(target, value, scope)?;
            }
            StmtKind::PrintBlock(value, body) => self.print(&self.filtered(value, body, scope)?, out)?,
            StmtKind::Macro(node) => {
                self.keep(scope)?;
                let value = Value::Macro(Rc::new(MacroValue { node: node.clone(), scope: scope.clone() }));
                scope.set(&node.name, value);
            }
            StmtKind::CallBlock(call, node) => self.call_block(call, node, scope, out)?,
            StmtKind::With(values, body) => {
                let inner = Scope::new(Some(scope));
                for (target, value) in values {
                    self.assign(target, self.eval(value, scope)?, &inner)?;
                }
                return self.block(body, &inner, out);
            }
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// A block's text, and an expression over it.
    fn filtered(&self, value: &Expr, body: &[Stmt], scope: &Rc<Scope>) -> Outcome<Value> {
        let inner = Scope::new(Some(scope));
        let mut text = Builder::new(&self.meter)?;
        self.block(body, &inner, &mut text)?;
        let around = Scope::new(Some(scope));
        around.set(&BLOCK.into(), Value::Str(text.finish()));
        self.eval(value, &around)
    }

    fn call_block(&self, call: &Expr, node: &Arc<MacroNode>, scope: &Rc<Scope>, out: &mut Builder) -> Outcome<()> {
        let Kind::Call(callee, args) = &call.kind else { return Ok(()) };
        self.keep(scope)?;
        let caller = Value::Macro(Rc::new(MacroValue { node: node.clone(), scope: scope.clone() }));
        let callee = self.eval(callee, scope)?;
        let mut given = self.given(args, scope)?;
        given.named.push(("caller".into(), caller));
        let value = self.call(&callee, given)?;
        self.print(&value, out)
    }

    fn assign(&self, target: &Target, value: Value, scope: &Rc<Scope>) -> Outcome<()> {
        match target {
            Target::Name(name) => scope.set(name, value),
            Target::Attr(of, name) => match scope.get(of) {
                Some(Value::Namespace(_)) if name.starts_with('_') => {
                    return Err(Fault::error(format!("a namespace has no place for '{name}'")));
                }
                Some(Value::Namespace(n)) => {
                    n.borrow_mut().insert(name.clone(), value);
                }
                _ => return Err(Fault::error(format!("'{of}' is no namespace: its attributes cannot be set"))),
            },
            Target::Tuple(targets) => {
                let items = self.items(&value)?;
                if items.len() != targets.len() {
                    let (wanted, found) = (targets.len(), items.len());
                    return Err(Fault::error(format!("{wanted} values were expected, {found} are there")));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item, scope)?;
                }
            }
        }
        Ok(())
    }

    fn each(
        &self,
        node: &Arc<ForNode>,
        over: &Value,
        scope: &Rc<Scope>,
        level: usize,
        out: &mut Builder,
    ) -> Outcome<()> {
        let row = match (over, &node.only) {
            (Value::Seq(row), None) => row.clone(),
            _ => {
                let mut items = self.items(over)?;
                if let Some(only) = &node.only {
                    let mut kept = Vec::new();
                    for item in items {
                        let inner = Scope::new(Some(scope));
                        self.assign(&node.target, item.clone(), &inner)?;
                        if self.eval(only, &inner)?.truth() {
                            kept.push(item);
                        }
                    }
                    items = kept;
                }
                Rc::new(Seq::new(&self.meter, Row::List, items)?)
            }
        };
        if row.items.is_empty() {
            self.block(&node.otherwise, &Scope::new(Some(scope)), out)?;
            return Ok(());
        }
        let recursive = node.recursive.then(|| (node.clone(), scope.clone()));
        if recursive.is_some() {
            self.keep(scope)?;
        }
        let state = Rc::new(Loop {
            row,
            index: Cell::new(0),
            level,
            changed: RefCell::default(),
            ended: Cell::new(false),
            recursive,
            _held: self.meter.hold(128)?,
        });
        let done = self.turns(node, &state, scope, out);
        state.ended.set(true);
        state.changed.take();
        done
    }

    fn turns(&self, node: &ForNode, state: &Rc<Loop>, scope: &Rc<Scope>, out: &mut Builder) -> Outcome<()> {
        for (i, item) in state.row.items.iter().enumerate() {
            self.meter.steps(1)?;
            state.index.set(i);
            let inner = Scope::new(Some(scope));
            inner.set(&"loop".into(), Value::Loop(state.clone()));
            self.assign(&node.target, item.clone(), &inner)?;
            if self.block(&node.body, &inner, out)? == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    /// The value of an expression.
    pub fn eval(&self, e: &Expr, scope: &Rc<Scope>) -> Outcome<Value> {
        self.deeper(|| self.eval_kind(&e.kind, scope)).map_err(|f| f.at(e.line))
    }

    fn eval_all(&self, list: &[Expr], scope: &Rc<Scope>) -> Outcome<Vec<Value>> {
        list.iter().map(|e| self.eval(e, scope)).collect()
    }

    fn eval_kind(&self, kind: &Kind, scope: &Rc<Scope>) -> Outcome<Value> {
        let m = &self.meter;
        match kind {
            Kind::Name(name) => Ok(scope.get(name).unwrap_or_else(|| Machine::global(name))),
            Kind::None => Ok(Value::None),
            Kind::Bool(b) => Ok(Value::Bool(*b)),
            Kind::Int(n) => Ok(Value::Int(*n)),
            Kind::Float(x) => Ok(Value::Float(*x)),
            Kind::Str(s) => Value::str(m, s),
            Kind::Tuple(list) => Value::tuple(m, self.eval_all(list, scope)?),
            Kind::List(list) => Value::list(m, self.eval_all(list, scope)?),
            Kind::Dict(pairs) => {
                let pair = |(k, v): &(Expr, Expr)| Ok((self.eval(k, scope)?, self.eval(v, scope)?));
                Value::dict(m, pairs.iter().map(pair).collect::<Outcome<_>>()?)
            }
            Kind::Attr(of, name) => self.attribute(&self.eval(of, scope)?, name),
            Kind::Item(of, index) => self.item_or_slice(of, index, scope),
            Kind::Slice(_) => Err(Fault::error("a slice is no value")),
            Kind::Call(callee, args) => {
                let callee = self.eval(callee, scope)?;
                let given = self.given(args, scope)?;
                self.call(&callee, given)
            }
            Kind::Filter(value, name, args) => {
                let value = self.eval(value, scope)?;
                let given = self.given(args, scope)?;
                self.filter(name, value, given)
            }
            Kind::Test(value, name, args) => {
                let value = self.eval(value, scope)?;
                let given = self.given(args, scope)?;
                Ok(Value::Bool(self.test(name, &value, given)?))
            }
            Kind::Neg(e) => ops::negative(self.eval(e, scope)?.defined()?),
            Kind::Pos(e) => ops::positive(self.eval(e, scope)?.defined()?),
            Kind::Not(e) => Ok(Value::Bool(!self.eval(e, scope)?.truth())),
            Kind::Binary(op, a, b) => {
                let (a, b) = (self.eval(a, scope)?, self.eval(b, scope)?);
                self.binary(op, a.defined()?, b.defined()?)
            }
            Kind::And(a, b) => {
                let a = self.eval(a, scope)?;
                if a.truth() { self.eval(b, scope) } else { Ok(a) }
            }
            Kind::Or(a, b) => {
                let a = self.eval(a, scope)?;
                if a.truth() { Ok(a) } else { self.eval(b, scope) }
            }
            Kind::Compare(first, list) => self.compared(first, list, scope),
            Kind::Concat(list) => {
                let mut out = Builder::new(m)?;
                for e in list {
                    self.print(&self.eval(e, scope)?, &mut out)?;
                }
                Ok(Value::Str(out.finish()))
            }
            Kind::If(condition, value, otherwise) => match (self.eval(condition, scope)?.truth(), otherwise) {
                (true, _) => self.eval(value, scope),
                (false, Some(otherwise)) => self.eval(otherwise, scope),
                (false, None) => Ok(Value::undefined("the condition does not hold, and it has no else")),
            },
        }
    }

    fn item_or_slice(&self, of: &Expr, index: &Expr, scope: &Rc<Scope>) -> Outcome<Value> {
        let of = self.eval(of, scope)?;
        let Kind::Slice(parts) = &index.kind else { return self.item(&of, &self.eval(index, scope)?) };
        let mut given = [None; 3];
        for (slot, part) in given.iter_mut().zip(parts) {
            let Some(part) = part else { continue };
            let value = self.eval(part, scope)?;
            *slot = match value.as_int() {
                Some(n) => Some(n),
                None if matches!(value, Value::None) => None,
                None => return Err(Fault::error(format!("a slice takes whole numbers, not {}", value.kind()))),
            };
        }
        self.slice(&of, given)
    }

    fn compared(&self, first: &Expr, list: &[(&str, Expr)], scope: &Rc<Scope>) -> Outcome<Value> {
        let mut left = self.eval(first, scope)?;
        for (op, right) in list {
            let right = self.eval(right, scope)?;
            if !self.compare(op, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn given(&self, args: &Args, scope: &Rc<Scope>) -> Outcome<Given> {
        let mut given = Given { list: self.eval_all(&args.list, scope)?, named: Vec::new() };
        for (name, value) in &args.named {
            given.named.push((name.clone(), self.eval(value, scope)?));
        }
        if let Some(rest) = &args.rest {
            given.list.extend(self.items(&self.eval(rest, scope)?)?);
        }
        if let Some(rest) = &args.rest_named {
            let rest = self.eval(rest, scope)?;
            let Value::Dict(rest) = &rest else {
                return Err(Fault::error(format!("** takes a dict, not {}", rest.kind())));
            };
            for (name, value) in rest.entries() {
                let name = name.as_str().ok_or_else(|| Fault::error("** takes a dict with texts as keys"))?;
                // The names are copied; a call may then search all of them for each of its parameters.
                drop(self.meter.hold(name.len())?);
                self.meter.look(name.len())?;
                given.named.push((name.into(), value.clone()));
            }
        }
        Ok(given)
    }

    /// Calls a value.
    pub fn call(&self, callee: &Value, given: Given) -> Outcome<Value> {
        self.meter.steps(given.list.len() + given.named.len())?;
        match callee {
            Value::Function(name) => self.function(name, given),
            Value::Method(of, name) => self.method(of, name, given),
            Value::Macro(m) => self.deeper(|| self.call_macro(m, given)),
            Value::Loop(l) => {
                let Some((node, scope)) = &l.recursive else {
                    return Err(Fault::error("loop() is for loops that are marked recursive"));
                };
                let [over] = given.take("loop", ["iterable"])?;
                let over = over.ok_or_else(|| Fault::error("loop() takes what to loop over"))?;
                let mut out = Builder::new(&self.meter)?;
                self.deeper(|| self.each(node, &over, scope, l.level + 1, &mut out))?;
                Ok(Value::Str(out.finish()))
            }
            other => Err(Fault::error(format!("{} is not callable", other.defined()?.kind()))),
        }
    }

    fn call_macro(&self, m: &MacroValue, given: Given) -> Outcome<Value> {
        let (node, scope) = (&m.node, Scope::new(Some(&m.scope)));
        let mut list = given.list.into_iter();
        let mut named = given.named;
        let given_names = named.len();
        let mut take = |name: &str| named.iter().position(|(n, _)| &**n == name).map(|i| named.remove(i).1);
        let caller = if node.caller { take("caller") } else { None };
        for (name, default) in &node.params {
            self.meter.steps(1 + given_names)?;
            let value = match (list.next(), take(name)) {
                (Some(_), Some(_)) => {
                    return Err(Fault::error(format!("macro '{}' got two values for '{name}'", node.name)));
                }
                (Some(value), None) | (None, Some(value)) => value,
                (None, None) => match default {
                    Some(default) => self.eval(default, &scope)?,
                    None => Value::undefined(format!("parameter '{name}' of macro '{}' was not given", node.name)),
                },
            };
            scope.set(name, value);
        }
        if node.caller {
            scope.set(&"caller".into(), caller.unwrap_or_else(|| Value::undefined("no caller is defined")));
        }
        if node.varargs {
            scope.set(&"varargs".into(), Value::tuple(&self.meter, list.collect())?);
        } else if list.next().is_some() {
            return Err(Fault::error(format!("macro '{}' takes {} arguments", node.name, node.params.len())));
        }
        if node.kwargs {
            let pairs = named.drain(..).map(|(n, v)| Ok((Value::str(&self.meter, &n)?, v))).collect::<Outcome<_>>()?;
            scope.set(&"kwargs".into(), Value::dict(&self.meter, pairs)?);
        } else if let Some((name, _)) = named.first() {
            return Err(Fault::error(format!("macro '{}' has no parameter '{name}'", node.name)));
        }
        let mut out = Builder::new(&self.meter)?;
        self.block(&node.body, &scope, &mut out)?;
        Ok(Value::Str(out.finish()))
    }

    /// What a loop over the value meets.
    pub fn items(&self, value: &Value) -> Outcome<Vec<Value>> {
        match value {
            Value::Undefined(_) => Ok(Vec::new()),
            Value::Seq(s) => {
                // There has to be room for the copy.
                drop(self.meter.hold(s.items.len().saturating_mul(size_of::<Value>()))?);
                Ok(s.items.clone())
            }
            Value::Dict(d) => {
                drop(self.meter.hold(d.entries().len().saturating_mul(size_of::<Value>()))?);
                Ok(d.entries().iter().map(|(k, _)| k.clone()).collect())
            }
            Value::Str(s) => {
                let mut bytes = [0; 4];
                s.chars().map(|c| Value::str(&self.meter, c.encode_utf8(&mut bytes))).collect()
            }
            other => Err(Fault::error(format!("{} is not iterable", other.kind()))),
        }
    }

    /// A row of values.
    pub fn row(&self, row: Row, items: Vec<Value>) -> Outcome<Value> {
        Value::seq(&self.meter, row, items)
    }

    /// The text that printing a value gives.
    pub fn text_of(&self, value: &Value) -> Outcome<Str> {
        if let Value::Str(s) = value {
            return Ok(s.clone());
        }
        let mut out = Builder::new(&self.meter)?;
        self.print(value, &mut out)?;
        Ok(out.finish())
    }
}
