//! Chat templates: any text is a template that renders a conversation, or an error, in bounded time and memory.
#![no_main]

use lacuna_checkpoint::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(template) = std::str::from_utf8(data).map_err(drop).and_then(|s| ChatTemplate::new(s).map_err(drop)) else {
        return;
    };
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Hi, \"caf\u{e9}\" \u{1f600}")];
    let tools =
        serde_json::json!([{"type": "function", "function": {"name": "f", "parameters": {"n": 1.5, "items": null}}}]);
    for tools in [None, Some(&tools)] {
        let _ = template.render(&messages, true, "<s>", "</s>", tools);
    }
});
