//! The filters that put values in order, or compare them with each other.

use super::eval::{Given, Machine};
use super::filters::truth;
use super::ops::order;
use super::same::equal;
use super::{Fault, Outcome, Row, Value};

impl Machine {
    /// Sorts by a key, and keeps the order of what is equal.
    pub(super) fn sorted<T: Clone>(
        &self,
        mut list: Vec<T>,
        key: impl Fn(&T) -> Value + Copy,
        reverse: bool,
    ) -> Outcome<Vec<T>> {
        if list.len() < 2 {
            return Ok(list);
        }
        let right = list.split_off(list.len() / 2);
        let (left, right) = (self.sorted(list, key, reverse)?, self.sorted(right, key, reverse)?);
        let mut out = Vec::with_capacity(left.len() + right.len());
        let (mut a, mut b) = (left.into_iter().peekable(), right.into_iter().peekable());
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            let (x, y) = (key(x), key(y));
            let Some(order) = order(self, x.defined()?, y.defined()?)? else {
                return Err(Fault::error(format!("{} and {} have no order", x.kind(), y.kind())));
            };
            let second = if reverse { order.is_lt() } else { order.is_gt() };
            out.extend(if second { b.next() } else { a.next() });
        }
        out.extend(a);
        out.extend(b);
        Ok(out)
    }

    pub(super) fn ordered(&self, name: &str, value: &Value, given: Given) -> Outcome<Value> {
        if name == "dictsort" {
            let [sensitive, by, reverse] = given.take(name, ["case_sensitive", "by", "reverse"])?;
            let Value::Dict(d) = value.defined()? else { return Err(Fault::error("dictsort takes a dict")) };
            let by_value = match by.as_ref().and_then(Value::as_str) {
                Some("value") => true,
                None | Some("key") => false,
                Some(_) => return Err(Fault::error("dictsort sorts by key or by value")),
            };
            let _room = self.meter.hold(d.entries().len().saturating_mul(4 * size_of::<Value>()))?;
            let mut keyed = Vec::new();
            for (k, v) in d.entries() {
                let key = self.folded(if by_value { v } else { k }.clone(), truth(&sensitive))?;
                keyed.push((key, Value::tuple(&self.meter, vec![k.clone(), v.clone()])?));
            }
            let sorted = self.sorted(keyed, |(k, _)| k.clone(), truth(&reverse))?;
            return self.row(Row::List, sorted.into_iter().map(|(_, v)| v).collect());
        }
        let (attribute, default, sensitive, reverse) = match name {
            "sort" => {
                let [reverse, sensitive, attribute] = given.take(name, ["reverse", "case_sensitive", "attribute"])?;
                (attribute, None, truth(&sensitive), truth(&reverse))
            }
            "groupby" => {
                let [attribute, default, sensitive] = given.take(name, ["attribute", "default", "case_sensitive"])?;
                (attribute, default, truth(&sensitive), false)
            }
            _ => {
                let [sensitive, attribute] = given.take(name, ["case_sensitive", "attribute"])?;
                (attribute, None, truth(&sensitive), name == "max")
            }
        };
        let items = self.items(value)?;
        // A key, its folded form and the item, and as many again while they are merged.
        let _room = self.meter.hold(items.len().saturating_mul(6 * size_of::<Value>()))?;
        let mut keyed = Vec::new();
        for item in items {
            let key = self.reached(item.clone(), &attribute, &default)?;
            keyed.push((self.folded(key.clone(), sensitive)?, key, item));
        }
        if name == "unique" {
            let mut kept: Vec<(Value, Value)> = Vec::new();
            for (key, _, item) in keyed {
                let mut known = false;
                for (other, _) in &kept {
                    self.meter.steps(1)?;
                    known = known || equal(&self.meter, other, &key)?;
                }
                if !known {
                    kept.push((key, item));
                }
            }
            return self.row(Row::Generator, kept.into_iter().map(|(_, item)| item).collect());
        }
        let sorted = self.sorted(keyed, |(k, _, _)| k.clone(), reverse)?;
        match name {
            "sort" => self.row(Row::List, sorted.into_iter().map(|(_, _, item)| item).collect()),
            "groupby" => {
                let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
                for (folded, key, item) in sorted {
                    match groups.last_mut() {
                        Some((last, _, group)) if equal(&self.meter, last, &folded)? => group.push(item),
                        _ => groups.push((folded, key, vec![item])),
                    }
                }
                let group = |(_, key, group)| self.row(Row::Tuple, vec![key, self.row(Row::List, group)?]);
                self.row(Row::List, groups.into_iter().map(group).collect::<Outcome<_>>()?)
            }
            _ => {
                let first = sorted.into_iter().next().map(|(_, _, item)| item);
                Ok(first.unwrap_or_else(|| Value::undefined(format!("{name} of nothing"))))
            }
        }
    }

    /// A text in small letters, where large ones do not count.
    fn folded(&self, value: Value, sensitive: bool) -> Outcome<Value> {
        match &value {
            Value::Str(s) if !sensitive => self.text_method(s, "lower", Given::default()),
            _ => Ok(value),
        }
    }
}
