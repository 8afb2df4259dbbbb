use serde_json::json;

use super::*;

fn one(source: &str) -> Result<String, TemplateError> {
    ChatTemplate::new(source)?.render(&[], true, "<s>", "</s>", None)
}

#[test]
fn refusals_and_failures_say_why() {
    assert!(matches!(one("{{ raise_exception('roles!') }}"), Err(TemplateError::Refused(t)) if t == "roles!"));
    assert!(
        matches!(one("{{ missing.field }}"), Err(TemplateError::Failed(t)) if t == "line 1: 'missing' is undefined")
    );
    assert!(matches!(ChatTemplate::from_gguf(&Metadata::default()), Err(TemplateError::Missing(_))));
}

/// A template that is no template is told by its name, its line, and what is wrong there.
#[test]
fn errors_of_syntax_say_where() {
    let named = |name: &str, source: &str| {
        let list =
            json!([{"name": "default", "template": "{{ messages[0].content }}"}, {"name": name, "template": source}]);
        ChatTemplate::from_config(&json!({"chat_template": list})).unwrap_err().to_string()
    };
    let told = named("tool_use", "a\n{%- if x %}\n{{ y }\n{% endif %}");
    assert_eq!(told, "the chat template does not parse: 'tool_use', line 3: unexpected '}'");
    for (source, line, what) in [
        ("{% for %}", 1, "expected a name"),
        ("\n\n{% if a %}x", 3, "unexpected the end of the template before elif or else or endif"),
        ("{{ 'open }}", 1, "a string does not end"),
        ("{# open", 1, "a comment does not end"),
        ("{% raw %}x", 1, "raw without endraw"),
        ("x\n{% nonsense %}", 2, "unknown tag 'nonsense'"),
        ("{% include 'other' %}", 1, "'include' is about other templates"),
        ("{{ a b }}", 1, "expected '}}', found 'b'"),
        ("{% set true = 1 %}", 1, "'true' cannot be assigned to"),
        ("{% break %}", 1, "'break' outside of a loop"),
        ("{{ f(a=1, 2) }}", 1, "without a name"),
        ("{{ '\\ud800' }}", 1, "stands for no letter"),
        ("{{ (1 }}", 1, "unexpected '}'"),
    ] {
        let told = ChatTemplate::new(source).unwrap_err();
        assert!(
            matches!(&told, TemplateError::Syntax(t) if t.starts_with(&format!("line {line}: ")) && t.contains(what)),
            "{source}: {told}"
        );
    }
    for deep in ["(".repeat(500), "[".repeat(5000), "-".repeat(5000), "not ".repeat(5000), "a.b".repeat(3000)] {
        assert!(matches!(one(&format!("{{{{ {deep} }}}}")), Err(TemplateError::Syntax(_))));
    }
    let blocks = "{% if a %}".repeat(3000);
    assert!(matches!(one(&blocks), Err(TemplateError::Syntax(t)) if t.contains("deep")));
    assert!(matches!(one(&format!("{{{{ 1{} }}}}", " + 1".repeat(5000))), Err(TemplateError::Syntax(_))));
}

/// Programs from outside end, whatever they ask for, before they have taken much memory or time.
#[test]
fn hostile_templates_end() {
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    assert!(matches!(one(loops), Err(TemplateError::Failed(t)) if t.contains("instructions")));
    let huge = "99999999999";
    for source in [
        "{% for a in range(90000) %}{{ 'x' * 90000 }}{% endfor %}".to_owned(),
        "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}".into(),
        "{% set ns = namespace(x=[1]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}".into(),
        "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = ns.x + ['y' * 99999] %}{% endfor %}".into(),
        "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}".into(),
        "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ('x' ~ ns.x) | join('xx' * 999999) %}{% endfor %}".into(),
        "{% set x %}{% for a in range(90000) %}{% for b in range(90) %}0123456789012345678901234567890123456789{% endfor %}{% endfor %}{% endset %}".into(),
        format!("{{{{ 'x' * {huge} }}}}"),
        format!("{{{{ [1, 2] * {huge} }}}}"),
        format!("{{{{ ([1, 2] * {huge}) | length }}}}"),
        format!("{{{{ 'x'.ljust({huge}) }}}}"),
        format!("{{{{ 'x'.rjust({huge}, 'é') }}}}"),
        format!("{{{{ 'x'.center({huge}) }}}}"),
        format!("{{{{ 'x' | center({huge}) }}}}"),
        format!("{{{{ '5'.zfill({huge}) }}}}"),
        format!("{{{{ '\\t'.expandtabs({huge}) }}}}"),
        format!("{{{{ 'a\\nb' | indent({huge}) }}}}"),
        format!("{{{{ [1] | tojson(indent={huge}) }}}}"),
        format!("{{{{ '%{huge}d' % 1 }}}}"),
        format!("{{{{ '%.{huge}f' % 1 }}}}"),
        format!("{{{{ '%*d' % ({huge}, 1) }}}}"),
        format!("{{{{ '{{:{huge}}}'.format(1) }}}}"),
        format!("{{{{ '{{:.{huge}f}}'.format(1.5) }}}}"),
        format!("{{{{ range({huge}) | list }}}}"),
        format!("{{{{ [1] | batch({huge}, 0) | list }}}}"),
        format!("{{{{ [1] | slice({huge}) | list }}}}"),
        format!("{{{{ {huge} ** {huge} }}}}"),
        "{{ 170141183460469231731687303715884105727 + 1 }}".into(),
        "{{ -170141183460469231731687303715884105727 - 2 }}".into(),
        "{{ (-170141183460469231731687303715884105727 - 1) // -1 }}".into(),
        "{{ ('\\n' * 9999999).splitlines() | length }}".into(),
        "{{ (' x' * 9999999).split() | length }}".into(),
        "{{ ('\\n' * 9999999) | indent }}".into(),
        "{{ ([1] * 999999) | sort | length }}".into(),
        "{{ ('x' * 9999999) | list | length }}".into(),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        "{% macro m(n) %}{% if n %}{% for x in [1] %}{{ m(n - 1) if n else 0 }}{% endfor %}{% endif %}{% endmacro %}{{ m(99999) }}".into(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{% set ns = namespace(x=[]) %}{% for a in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}".into(),
        "{% set ns = namespace(l=none) %}{% for a in range(9999) %}{% for b in [ns.l] %}{% set ns.l = loop %}{% endfor %}{% endfor %}".into(),
    ] {
        assert!(matches!(one(&source), Err(TemplateError::Failed(_))), "{source}");
    }
    // The deepest recursion fits the stack of any thread.
    let deep = "{% macro m(n) %}{{ [m(n - 1) ~ 'x' | upper] | first if n else 0 }}{% endmacro %}{{ m(99999) }}";
    let small = std::thread::Builder::new().stack_size(1 << 20);
    let told = small.spawn(move || one(deep).unwrap_err().to_string()).unwrap().join().unwrap();
    assert!(told.contains("more than 250 deep"), "{told}");
    // Rings and long chains of values go, too.
    for source in [
        "{% set ns = namespace() %}{% set ns.x = ns %}{% set ns.y = [ns] %}",
        "{% set ns = namespace(x=none) %}{% for a in range(90000) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}",
        "{% set ns = namespace(m=none) %}{% for a in range(90000) %}{% set old = ns.m %}{% macro m() %}{{ old }}{% endmacro %}{% set ns.m = m %}{% endfor %}",
        "{{ [1, 2, 3][2:9:-1] }}{{ 'abc'[5:1:-1] }}{{ 'abc'[::-9223372036854775807] }}{{ ''[::-1] }}{{ 'abc'[9:] }}",
        "{{ [3, 1.5, 'nan' | float, 2, 'nan' | float, 0] | sort | length }}",
    ] {
        one(source).unwrap_or_else(|e| panic!("{source}: {e}"));
    }
}

/// One run of a template, without the trials that a template is put to when it is read.
fn once(source: &str) -> Result<String, Fault> {
    Program::parse(source)?.render(&[], SystemTime::UNIX_EPOCH)
}

/// What nests ends at a depth, and what holds itself is let go of.
#[test]
fn chains_of_filters_and_loops_end() {
    let small = std::thread::Builder::new().stack_size(2 << 20);
    let maps = || once("{{ 'a' | map(*['map'] * 20000) | list }}").unwrap_err().what;
    let told = small.spawn(maps).unwrap().join().unwrap();
    assert!(told.contains("deep") || told.contains("instructions"), "{told}");
    let chain = "{% set ns = namespace(p=1) %}{% for i in range(100000) %}{% for j in [1] %}\
        {% set _ = loop.changed(ns.p) %}{% set ns.p = loop %}{% endfor %}{% endfor %}";
    once(chain).unwrap();
    let ended = "{% set ns = namespace() %}{% for j in [1] %}{% set ns.l = loop %}{% endfor %}{{ ns.l.changed(ns.l) }}";
    assert!(once(ended).unwrap_err().what.contains("has ended"));
    assert_eq!(once("{% for j in [1, 1] %}{{ loop.changed(loop) }}{% endfor %}").unwrap(), "TrueFalse");
}

/// Whatever a program asks for over and over is paid for, in steps or in memory.
#[test]
fn what_is_looked_at_is_paid_for() {
    let over =
        |set: &str, body: &str| format!("{set}{{% for i in range(100000) %}}{{% set x = {body} %}}{{% endfor %}}");
    let long = "{% set s = 'a' * 3000000 %}";
    let doubled = "{% set ns = namespace(a=[], b=[], t=(1,), u=(1,)) %}{% for i in range(60) %}\
        {% set ns.a = [ns.a, ns.a] %}\
        {% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% set ns.u = (ns.u, ns.u) %}{% endfor %}";
    let names = "{% set d = dict.fromkeys(range(90000) | map('string') | list, 1) %}";
    let mut all = vec![over("{% set s = 'a' * 30000000 %}", "s | wordcount")];
    for body in [
        "s | wordcount",
        "s | list",
        "s.find('b')",
        "s | lower",
        "s | title",
        "s | tojson",
        "[s] | string",
        "s | length",
        "s ~ 'b' == s ~ 'b'",
        "s[5]",
        "s | int",
        "s | trim",
        "s.split('b')",
        "s | indent",
        "'b' in s",
        "s is lower",
        "s.isalpha()",
        "s | escape",
        "'%s' % s",
        "'{}'.format(s)",
        "{}[s]",
    ] {
        all.push(over(long, body));
    }
    for value in [
        "ns.a == ns.b",
        "{ns.t: 1}",
        "ns.a in [ns.b]",
        "[ns.a, ns.b] | sort",
        "[ns.a, ns.b] | unique | list",
        "{1: 2}.get(ns.t)",
        "[ns.a].index(ns.b)",
        "[ns.a, ns.b] | groupby(0)",
        "ns.t < ns.u",
    ] {
        all.push(format!("{doubled}{{{{ {value} }}}}"));
    }
    for body in ["namespace(**d)", "range(1, **d)", "dict(**d)", "d.copy()", "d == d.copy()", "d | list", "d | tojson"]
    {
        all.push(over(names, body));
    }
    all.push(over(
        "{% set t = ((range(100000) | map('string') | list) | join(' ')).split() %}",
        "t | map('upper') | list",
    ));
    all.push(over("{% set ns = namespace(t=()) %}{% set t = ('bc',) * 100000 %}", "'a'.startswith(t)"));
    all.push(
        "{% set s = 'a' * 20000000 %}{% set ns = namespace(l=[]) %}{% for i in range(200) %}\
        {% set ns.l = ns.l + [namespace(**{s: 1})] %}{% endfor %}"
            .into(),
    );
    all.push("{{ ('\\n' * 30000000) | indent }}".into());
    for source in all {
        let start = std::time::Instant::now();
        let told = once(&source).expect_err(&source).what;
        let known = ["instructions", "bytes of memory", "takes no names"].iter().any(|w| told.contains(w));
        assert!(known && start.elapsed().as_secs() < 20, "{source}: {told}, {:?}", start.elapsed());
    }
    // What is not there keeps the start of its name only.
    let missing = "{% set s = 'a' * 50000000 %}{{ {}[s].x }}";
    assert!(once(missing).unwrap_err().what.len() < 300);
    // Names are found at once, however many there are.
    let many: String = (0..60_000).map(|i| format!("{{% set a{i} = 1 %}}")).collect();
    assert_eq!(once(&many).unwrap(), "");
    let found =
        format!("{names}{{% set ns = namespace(**d) %}}{{% for i in range(100000) %}}{{{{ ns.zz }}}}{{% endfor %}}");
    assert_eq!(once(&found).unwrap(), "");
}

/// A template is bounded before it is a tree, and so is what it says of its end.
#[test]
fn large_templates_and_messages_are_cut() {
    for list in ["a,".repeat(250_000), "a,".repeat(2_000_000)] {
        let told = once(&format!("{{{{ 0 if false else [{list}] }}}}")).unwrap_err();
        assert!(told.kind == FaultKind::Syntax && told.what.contains("too large"), "{}", told.what);
    }
    let large = ChatTemplate::from_config(&json!({"chat_template": "a".repeat(5 << 20)}));
    assert!(matches!(large, Err(TemplateError::Syntax(t)) if t.contains("at the most")));
    assert_eq!(once("{{ raise_exception('a' * 30000000) }}").unwrap_err().what.len(), 1000);
    assert_eq!(once("{{ '--5' | int }} {{ '-5' | int }} {{ '+5' | int }} {{ '-+5' | int(7) }}").unwrap(), "0 -5 5 7");
}

/// Bytes in use, as the system counts them.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[cfg(target_os = "linux")]
#[test]
fn a_loop_that_compares_itself_is_let_go_of() {
    let before = resident();
    for _ in 0..20 {
        once("{% for j in [1] %}{% if loop.changed(loop, 'a' * 30000000) %}x{% endif %}{% endfor %}").unwrap();
    }
    // Other tests run beside this one; what leaked were 600 MB.
    assert!(resident() < before + (400 << 20));
}

#[test]
fn templates_that_look_at_tools_are_known() {
    let takes = |source: &str| ChatTemplate::new(source).unwrap().takes_tools();
    assert!(takes("{% if tools %}{{ tools | tojson }}{% endif %}") && takes("{%- if tools is not none -%}{% endif %}"));
    assert!(!takes("{{ messages[0].content }} has no mytools or tools_in_user_message"));
    let messages = json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]);
    let t = ChatTemplate::new("{{ messages[0].tool_calls[0].function.name }}").unwrap();
    assert_eq!(t.render_json(&messages, true, "", "", None).unwrap(), "f");
}

#[test]
fn tools_go_to_the_template_that_is_for_them() {
    assert_eq!(one("{{ tools is none }}{{ bos_token + eos_token }}{{ nothing }}").unwrap(), "True<s></s>");
    assert_eq!(one("{{ strftime_now('%Y') | length }}").unwrap(), "4");
    let list = json!([{"name": "rag", "template": "{% broken"}, {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"}]);
    let map = json!({"tool_use": "tools", "default": "plain"});
    for templates in [list, map] {
        let t = ChatTemplate::from_config(&json!({ "chat_template": templates })).unwrap();
        assert_eq!(t.render(&[], false, "", "", None).unwrap(), "plain");
        assert_eq!(t.render(&[], false, "", "", Some(&json!([]))).unwrap(), "tools");
        assert_eq!(t.source(), "tools");
    }
    let only = json!({"chat_template": [{"name": "tool_use", "template": "x"}]});
    assert!(matches!(ChatTemplate::from_config(&only), Err(TemplateError::Missing(t)) if t.contains("tool_use")));
    assert!(matches!(
        ChatTemplate::from_config(&json!({"chat_template": [{"name": "x"}]})),
        Err(TemplateError::Syntax(_))
    ));
}

#[test]
fn templates_in_files_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let says = |tools: bool| {
        let t = ChatTemplate::from_dir(dir.path())?;
        t.render(&[], false, "", "", tools.then_some(&json!([])))
    };
    assert!(matches!(says(false), Err(TemplateError::Missing(_))));
    put(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old tools"}]}"#,
    );
    assert_eq!((says(false).unwrap(), says(true).unwrap()), ("old".into(), "old tools".into()));
    // Files of their own come first, and fill what they do not give from the configuration only where there is no
    // default among them.
    put("additional_chat_templates/tool_use.jinja", "new tools");
    put("additional_chat_templates/notes.txt", "no template");
    assert_eq!((says(false).unwrap(), says(true).unwrap()), ("old".into(), "new tools".into()));
    put("chat_template.jinja", "new");
    assert_eq!((says(false).unwrap(), says(true).unwrap()), ("new".into(), "new tools".into()));
    let names: Vec<String> = templates_in(dir.path()).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["default", "tool_use"]);
    put("additional_chat_templates/tool_use.jinja", "{{");
    let told = says(true).unwrap_err().to_string();
    assert!(told.contains("'tool_use', line 1"), "{told}");
}

const TEXTS: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";
const JOINED: &str = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}";
const PARTS: &str = "{% for m in messages %}[{{ m.role }}] {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif \
    p.type == 'image' %}<image>{% endif %}{% endfor %}{{ '\n' }}{% endfor %}";
const BOTH: &str = "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content \
    %}{{ '<' ~ p.type ~ '>' ~ p.text }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}";
/// As `PARTS` for what a user says only.
const MIXED: &str = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}{{ '(' + m.content + ')' }}{% endif \
    %}{% endfor %}";

/// What is said comes through, in whatever form it is given and the template takes it.
#[test]
fn contents_come_in_the_form_that_the_template_takes() {
    let text = json!([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]);
    let part = |t: &str| json!([{"type": "text", "text": t}]);
    let parts = json!([{"role": "system", "content": part("S")}, {"role": "user", "content": part("U")},
        {"role": "assistant", "content": part("A")}]);
    for (source, of_text, of_parts) in [
        (TEXTS, "[system] S\n[user] U\n[assistant] A\n", "[system] S\n[user] U\n[assistant] A\n"),
        (JOINED, "system:S;user:U;assistant:A;", "system:S;user:U;assistant:A;"),
        (PARTS, "[system] S\n[user] U\n[assistant] A\n", "[system] S\n[user] U\n[assistant] A\n"),
        (BOTH, "[system] S\n[user] U\n[assistant] A\n", "[system] <text>S\n[user] <text>U\n[assistant] <text>A\n"),
        (MIXED, "(S)U(A)", "(S)U(A)"),
    ] {
        let t = ChatTemplate::new(source).unwrap();
        assert_eq!(t.render_json(&text, false, "", "", None).unwrap(), of_text, "{source}");
        assert_eq!(t.render_json(&parts, false, "", "", None).unwrap(), of_parts, "{source}");
    }
    let several = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(ChatTemplate::new(TEXTS).unwrap().render_json(&several, false, "", "", None).unwrap(), "[user] ab\n");
}

#[test]
fn what_has_no_place_is_refused() {
    let image = json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]);
    let told = ChatTemplate::new(TEXTS).unwrap().render_json(&image, false, "", "", None).unwrap_err();
    assert!(matches!(&told, TemplateError::LeftOut(t) if t.contains("'image'")), "{told}");
    assert_eq!(
        ChatTemplate::new(PARTS).unwrap().render_json(&image, false, "", "", None).unwrap(),
        "[user] <image>a\n"
    );
    // A template without a place for a system message, and one without a place for anything.
    let deaf = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
    let deaf = ChatTemplate::new(deaf).unwrap();
    assert_eq!(deaf.render(&[Message::new("user", "hi")], false, "", "", None).unwrap(), "hi");
    let system = [Message::new("system", "Be brief."), Message::new("user", "hi")];
    let told = deaf.render(&system, false, "", "", None).unwrap_err().to_string();
    assert!(told.contains("leaves out what 'system' says"), "{told}");
    let empty = [Message::new("system", " "), Message::new("user", "hi")];
    assert_eq!(deaf.render(&empty, false, "", "", None).unwrap(), "hi");
    assert!(matches!(
        ChatTemplate::new("nothing").unwrap().render(&[Message::new("user", "hi")], false, "", "", None),
        Err(TemplateError::LeftOut(_))
    ));
    // A refusal in the template's own words stays one.
    let strict =
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}";
    let told = ChatTemplate::new(strict).unwrap().render(&system, false, "", "", None).unwrap_err();
    assert!(matches!(&told, TemplateError::Refused(t) if t == "no system"), "{told}");
}
