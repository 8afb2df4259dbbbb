"use strict";
// Everything that a model or a server says becomes text nodes, never markup.

const at = (id) => document.getElementById(id);
const turns = [];
let model = "";
let running = null;

function element(tag, text, name) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (name) e.className = name;
  return e;
}

function headers() {
  const h = { "Content-Type": "application/json" };
  const key = at("key").value.trim();
  if (key) h.Authorization = "Bearer " + key;
  return h;
}

function complain(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function show(role, text) {
  const item = element("li", undefined, role);
  item.append(element("span", role === "user" ? "You" : "Model", "who"));
  const thought = element("div", "", "thought");
  thought.hidden = true;
  const said = element("div", text, "said");
  item.append(thought, said);
  at("turns").append(item);
  follow();
  return said;
}

function follow() {
  const list = at("turns");
  list.scrollTop = list.scrollHeight;
}

function busy(yes) {
  at("send").disabled = yes;
  at("stop").disabled = !yes;
  at("turns").setAttribute("aria-busy", String(yes));
}

// The events of a stream, one JSON value at a time.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
      const event = held.slice(0, end);
      held = held.slice(end + 2);
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function send(text) {
  complain("");
  turns.push({ role: "user", content: text });
  show("user", text);
  const said = show("assistant", "");
  const abort = new AbortController();
  running = abort;
  busy(true);
  let answer = "";
  let failed = null;
  try {
    const system = at("system").value.trim();
    const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: abort.signal,
      body: JSON.stringify({
        model, messages, stream: true,
        temperature: Number(at("temperature").value),
        max_tokens: Number(at("tokens").value),
      }),
    });
    if (!response.ok) {
      const problem = await response.json().catch(() => null);
      throw new Error(problem?.error?.message ?? "the server answered " + response.status);
    }
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices?.[0]?.delta;
      answer += delta?.content ?? "";
      said.textContent = answer;
      if (delta?.reasoning_content) {
        const thought = said.previousElementSibling;
        thought.hidden = false;
        thought.textContent += delta.reasoning_content;
      }
      follow();
    }
  } catch (e) {
    if (e.name !== "AbortError") failed = e;
  }
  running = null;
  busy(false);
  if (answer) {
    turns.push({ role: "assistant", content: answer });
  } else {
    // Nothing was said: the turn is taken back, so that it can be sent again.
    turns.pop();
    said.parentElement.previousElementSibling?.remove();
    said.parentElement.remove();
    if (!at("message").value) at("message").value = text;
  }
  if (failed) complain(failed.message);
  at("status").textContent = failed ? "" : "The answer is complete: " + answer;
  at("message").focus();
}

at("form").addEventListener("submit", (e) => {
  e.preventDefault();
  const text = at("message").value.trim();
  if (!text || running) return;
  at("message").value = "";
  send(text);
});
at("message").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    at("form").requestSubmit();
  }
});
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  at("turns").replaceChildren();
  complain("");
  at("message").focus();
});

function bytes(n) {
  if (n === null || n === undefined) return "?";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i++; }
  return (i === 0 ? n : n.toFixed(1)) + " " + units[i];
}

function list(dl, rows) {
  dl.replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]));
}

async function live() {
  try {
    const response = await fetch("/api/live", { headers: headers() });
    if (!response.ok) throw new Error();
    const s = await response.json();
    list(at("live"), [
      ["Written", s.tokens_per_second.toFixed(1) + " tok/s"],
      ["Read", s.prompt_tokens_per_second.toFixed(1) + " tok/s"],
      ["At work", s.running],
      ["Waiting", s.waiting],
      ["Memory", bytes(s.memory_bytes)],
      ["Keys and values", bytes(s.kv.bytes)],
      ["Blocks in use", s.kv.used + " of " + s.kv.total],
      ["Blocks kept", s.kv.cached],
    ]);
  } catch {
    list(at("live"), [["Server", "no answer"]]);
  }
}

function fixed(x, digits) {
  return typeof x === "number" ? x.toFixed(digits) : "";
}

async function card() {
  const response = await fetch("/api/card", { headers: headers() });
  if (response.status === 401) {
    complain("This server asks for an API key: put it under Settings.");
    return;
  }
  const c = await response.json();
  model = c.model;
  at("model").textContent = c.model;
  document.title = c.model + " – Lacuna";
  const rows = [
    ["Architecture", c.architecture],
    ["Format", c.format],
    ["Parameters", (c.parameters / 1e6).toFixed(1) + " M"],
    ["Size", bytes(c.bytes) + " (" + c.bits_per_weight.toFixed(2) + " bits a weight)"],
    ["Context", c.context + " tokens"],
    ["Activations", c.activations],
    ["Cache", c.kv],
    ...(c.run?.methods ?? []).map((m) => [m.question[0].toUpperCase() + m.question.slice(1), m.method + (m.lossless ? "" : " (an approximation)")]),
  ];
  list(at("card"), rows);
  const out = at("left-out");
  out.replaceChildren();
  if (!c.chat) complain("This model was not trained to chat and has no chat template.");
  if (c.approximations?.length) {
    out.append(element("h3", "What was left out"));
    const ul = element("ul");
    c.approximations.forEach((a) => ul.append(element("li", a)));
    out.append(ul);
  }
  if (c.steps?.length) {
    out.append(element("h3", "Recipe"));
    const ul = element("ul");
    c.steps.forEach((s) => ul.append(element("li", s)));
    out.append(ul);
  }
  const r = c.report;
  if (r?.ppl) {
    out.append(element("h3", "Measured cost"));
    const table = element("table");
    const head = element("tr");
    ["", "size", "perplexity", "tok/s"].forEach((t) => head.append(element("th", t)));
    table.append(head);
    const line = (name, size, ppl, speed) => {
      const tr = element("tr");
      [name, bytes(size), fixed(ppl, 2), fixed(speed, 1)].forEach((t) => tr.append(element("td", t)));
      table.append(tr);
    };
    line("this model", r.bytes_after, r.ppl, r.decode_tok_s);
    (r.baselines ?? []).forEach((b) => line(b.baseline.name, b.baseline.bytes, b.baseline.ppl, b.baseline.speed?.median));
    out.append(table);
    if (typeof r.pays === "boolean") out.append(element("p", r.pays ? "It pays." : "It does not pay: a baseline as good is no larger and no slower."));
  } else if (c.packed) {
    out.append(element("p", "Nothing was measured when this model was made (no report.json beside it)."));
  } else {
    out.append(element("p", "Nothing was left out here: the file runs as it came."));
  }
}

at("key").addEventListener("change", () => { complain(""); refresh(); });
async function refresh() {
  try {
    await card();
  } catch {
    complain("The server does not answer.");
  }
  live();
}
refresh();
setInterval(live, 2000);
at("message").focus();
