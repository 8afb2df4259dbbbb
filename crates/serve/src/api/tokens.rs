//! `/tokenize`, `/detokenize` and `/tokenizer_info`, for llama.cpp's clients and vLLM's at once: the fields of both are
//! taken, and what both look for is in the answer.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use serde_json::{Map, Value, json};

use super::{answer, chat, types};
use crate::app::App;
use crate::error::{ApiError, json_response};

/// `POST /tokenize`
pub async fn tokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let (told, _ticket) = app.admit("TokenizeRequest", request, |app, body, _| tokens(app, body)).await?;
        Ok(json_response(200, &told))
    })
    .await
}

/// `POST /detokenize`
pub async fn detokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let work = |app: &App, body: Value, _: &mut _| {
            let ids: Ids = types::read(body)?;
            app.check_tokens(&ids.tokens, "tokens")?;
            let text = app.tokenizer.decode_with_special(&ids.tokens);
            Ok(json!({ "content": text, "prompt": text }))
        };
        let (told, _ticket) = app.admit("DetokenizeRequest", request, work).await?;
        Ok(json_response(200, &told))
    })
    .await
}

/// `GET /tokenizer_info`, vLLM's: what clients that cut texts by themselves ask for, lm-eval among them.
pub async fn info(State(app): State<Arc<App>>) -> Response<Body> {
    let text = |id: Option<u32>| id.and_then(|id| app.tokenizer.token_text(id));
    let told = json!({
        "tokenizer_class": "lacuna", "bos_token": text(app.tokenizer.bos()), "eos_token": text(app.tokenizer.eos()),
        "pad_token": null, "vocab_size": app.tokenizer.vocab_size(), "model_max_length": app.context,
        "chat_template": app.template.as_ref().map(|t| t.source()),
    });
    json_response(200, &told)
}

#[derive(serde::Deserialize)]
struct Ids {
    tokens: Vec<u32>,
}

fn tokens(app: &App, mut body: Value) -> Result<Value, ApiError> {
    let flag = |name: &str, otherwise: bool| body[name].as_bool().unwrap_or(otherwise);
    let (pieces, names) = (flag("with_pieces", false), flag("return_token_strs", false));
    let given = ["content", "prompt", "messages"].map(|name| body.get(name).is_some());
    if given.iter().filter(|g| **g).count() != 1 {
        return Err(ApiError::new(400, "give one of 'content', 'prompt' and 'messages'"));
    }
    let ids = if given[2] {
        if body["add_special_tokens"] == true || body["add_special"] == true {
            let text = "'add_special_tokens' is for texts: a chat template writes the tokens that the model wants";
            return Err(ApiError::bad("add_special_tokens", text).code("unsupported_parameter"));
        }
        let kept = ["messages", "tools", "chat_template_kwargs", "add_generation_prompt"];
        let fields = body.as_object_mut().into_iter().flatten();
        let fields: Map<String, Value> =
            fields.filter(|(k, _)| kept.contains(&k.as_str())).map(|(k, v)| (k.clone(), v.take())).collect();
        let mut c: types::Chat = types::read(fields.into())?;
        chat::read(app, &mut c, false)?.prompt
    } else {
        // llama.cpp adds none unless told so, vLLM does.
        let special = if given[0] { flag("add_special", false) } else { flag("add_special_tokens", true) };
        let param = if given[0] { "content" } else { "prompt" };
        let text = body[param].as_str().unwrap_or_default();
        app.check_length(text, param)?;
        app.tokenizer.encode(text, special).map_err(|e| ApiError::bad(param, e.to_string()))?
    };
    let piece = |id: &u32| {
        let bytes = app.tokenizer.token_bytes(*id);
        json!({ "id": id, "piece": String::from_utf8(bytes).map_or_else(|e| Value::from(e.into_bytes()), Value::from) })
    };
    let told = if pieces { ids.iter().map(piece).collect() } else { Value::from(ids.clone()) };
    let mut all = json!({ "tokens": told, "count": ids.len(), "max_model_len": app.context });
    if names {
        all["token_strs"] = ids.iter().map(|&id| app.tokenizer.token_text(id).unwrap_or_default()).collect();
    }
    Ok(all)
}
