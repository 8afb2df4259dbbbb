//! The tree of a template.

use std::sync::Arc;

pub(super) struct Expr {
    pub line: u32,
    pub depth: usize,
    pub kind: Kind,
}

pub(super) enum Kind {
    Name(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    Tuple(Vec<Expr>),
    List(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attr(Box<Expr>, Arc<str>),
    Item(Box<Expr>, Box<Expr>),
    /// Inside an item's brackets only.
    Slice([Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Args),
    Filter(Box<Expr>, Arc<str>, Args),
    Test(Box<Expr>, Arc<str>, Args),
    Neg(Box<Expr>),
    Pos(Box<Expr>),
    Not(Box<Expr>),
    Binary(&'static str, Box<Expr>, Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Compare(Box<Expr>, Vec<(&'static str, Expr)>),
    Concat(Vec<Expr>),
    /// Condition, what holds, what holds otherwise.
    If(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
}

#[derive(Default)]
pub(super) struct Args {
    pub list: Vec<Expr>,
    pub named: Vec<(Arc<str>, Expr)>,
    pub rest: Option<Box<Expr>>,
    pub rest_named: Option<Box<Expr>>,
}

pub(super) struct Stmt {
    pub line: u32,
    pub kind: StmtKind,
}

pub(super) enum StmtKind {
    Text(Arc<str>),
    Print(Expr),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    For(Arc<ForNode>),
    Set(Target, Expr),
    /// The block's text under the name [`BLOCK`], then the expression over it.
    SetBlock(Target, Expr, Vec<Stmt>),
    PrintBlock(Expr, Vec<Stmt>),
    Macro(Arc<MacroNode>),
    /// A call, with a macro that it knows as `caller`.
    CallBlock(Expr, Arc<MacroNode>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Break,
    Continue,
}

pub(super) enum Target {
    Name(Arc<str>),
    /// An attribute of a namespace.
    Attr(Arc<str>, Arc<str>),
    Tuple(Vec<Target>),
}

pub(super) struct ForNode {
    pub target: Target,
    pub over: Expr,
    pub only: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Stmt>,
    pub otherwise: Vec<Stmt>,
}

pub(super) struct MacroNode {
    pub name: Arc<str>,
    pub params: Vec<(Arc<str>, Option<Expr>)>,
    pub body: Vec<Stmt>,
    /// It asks for what it was given beside its parameters.
    pub varargs: bool,
    pub kwargs: bool,
    pub caller: bool,
}

/// The name of a block's own text in the expression that filters it; no template can write it.
pub(super) const BLOCK: &str = " block";
