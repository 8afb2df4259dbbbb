#!/usr/bin/env python3
"""Two small tokenizers, a page of hard text through them and through the two real models', and rendered chat templates.

    python make_tokenizers.py OUT [MODEL.gguf ...]

OUT/bytelevel and OUT/metaspace get the files that transformers saves, with golden.json beside them. Each MODEL.gguf gives
OUT/<file stem>.json. OUT/chat.json holds the rendered conversations.
"""

import argparse
import json
import os
import random
import shutil

import gguf
import tokenizers
import transformers as tf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import gguf_twin
from common import versions, write_json

# Written for this file.
PARAGRAPHS = [
    "The river comes down from the hills in spring and takes the bridges with it, and every summer the people of the "
    "valley build the bridges again. They could build them higher, the engineer said, but the higher bridge would need "
    "a longer road, and the longer road would need the field of the widow, and the widow would not sell. So the bridge "
    "stays where it is, and the river takes it, and the people build it again.",
    "When you mix the flour with the water, do not stir for too long. Stirring makes the dough tough; resting makes it "
    "soft. Cover the bowl with a cloth, wait for thirty minutes, and then fold it over itself four times. If it sticks "
    "to your hands, wet them. Bake at 230 degrees for 25 minutes, then at 200 degrees for another 15.",
    "for i in range(10):\n    if i % 2 == 0:\n        print(i, end=\" \")\n    else:\n        continue\n\n"
    "def area(width, height):\n    \"\"\"The area of a rectangle.\"\"\"\n    return width * height\n",
    "let total: u64 = items.iter().map(|item| item.price * item.count).sum();\nif total > limit {\n"
    "    return Err(Error::TooMuch { total, limit });\n}\n",
    "Der Zug nach Köln fährt heute von Gleis 7 ab; er hat fünf Minuten Verspätung. Où est la bibliothèque ? Elle est à "
    "côté de l'église. El niño comió una manzana y después se fue a dormir. Москва встретила нас дождём, а потом вышло "
    "солнце. 今日はとても暑いです。明日も暑いでしょう。我们明天去北京。",
    "In 1969, 2 people walked on the Moon; in 1972, the last 2 did. That makes 12 in all. It's said that they'd have "
    "stayed, but they couldn't: the air wouldn't last, and we're glad they've come back. \"I'll go again,\" he said, "
    "\"if you'll have me.\"",
]

HARD = [
    "",
    " ",
    "a",
    "Hello, world!",
    "The river takes the bridge again.",
    " leading space",
    "trailing space ",
    "two  spaces, three   spaces, and ten          spaces.",
    "   three first",
    "\t",
    "\tone tab\t\ttwo tabs\t\t\tthree",
    " \t mixed \t blanks \t",
    "\n",
    "\n\n",
    "line one\nline two\n\nline four\n\n\n\nline eight",
    "trailing newline\n",
    "spaces before newline   \n   and after",
    "CRLF one\r\nCRLF two\r\n\r\nafter a blank\rlone CR",
    "It's they'd we're I'll you've can't I'M THEY'LL 'tis don\u2019t",
    "0 7 42 123 1234 12345 123456 1234567890 3.14159 1,000,000 -273.15 6.02e23 0xDEADBEEF v2.0.1",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u00bd \u2167 \u00b2 x\u00b3 \u2460",
    "https://example.org/a/b_c?q=1&r=%20two#frag-ment user@example.com C:\\Users\\me\\file.txt",
    "def f(x):\n    if x > 0:\n        return {\"a\": [1, 2, 3], 'b': None}\n\treturn x**2  # why?\n",
    "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", 1 << 3); return 0; }\n",
    "<div class=\"x\"><p>Text &amp; more</p></div><table><tr><td>1</td></tr></table>",
    "!!! ??? ... --- ___ === >>> <<< ((())) [[]] {{}} $$ %% ^^ && || ~~ `` @@ ## \\\\ //",
    "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2013 en \u2026 ellipsis \u00ab guillemets \u00bb \u00bfqu\u00e9? \u00a1s\u00ed!",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u0130stanbul \u0131\u015f\u0131k \u01c5 \ufb01n",
    "cafe\u0301 nai\u0308ve e\u0323\u0302 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324\u031e\u0349\u035a\u032f\u031e\u0320\u034da\u036b\u0357\u0334\u0362\u0335\u031c\u0330\u0354l",
    "\U0001f600 \U0001f680\U0001f680\U0001f680 ok\U0001f44d",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1eb\U0001f1f7\U0001f1ef\U0001f1f5 1\ufe0f\u20e3 \u2764\ufe0f",
    "\u4eca\u65e5\u306f\u3068\u3066\u3082\u6691\u3044\u3067\u3059\u3002\u660e\u65e5\u3082\uff01 \u6211\u4eec\u660e\u5929\u53bb\u5317\u4eac\u3002",
    "\uc548\ub155\ud558\uc138\uc694, \uc138\uacc4! \u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0643\u064a\u0641 \u062d\u0627\u0644\u0643\u061f \u0627\u0644\u0633\u0651\u064e\u0644\u0627\u0645\u064f",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u041c\u043e\u0441\u043a\u0432\u0430 \u0432\u0441\u0442\u0440\u0435\u0442\u0438\u043b\u0430 \u043d\u0430\u0441 \u0434\u043e\u0436\u0434\u0451\u043c \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u00a0no-break\u00a0space \u2003em\u2003space \u3000ideographic\u3000 \u200bzero\u200bwidth \u00adsoft",
    "\ufeffbyte order mark, \u202eright to left\u202c, \u0000nul, \u0007bell, \u001b[31mescape, \u007fdelete",
    "\U00010330\U00010331 \U0001d54f \U000e0041 \uffff \ufffd",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<|im_start|><|im_start|>d<|endoftext|>",
    "<|im_star|> <|im_end <im_end|>",
    "<bos>text<eos> <bos><eos> <unk><pad>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<0x41> <0x0A> <unused1> [multimodal]",
    "_under_score __dunder__ camelCaseWord SCREAMING_CASE kebab-case-word",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababababababababababababababababab" + " " * 40 + "x" + "\n" * 35 + "y" + "\t" * 33 + "z",
    "\u2581already\u2581an\u2581underline \u2581\u2581two",
    "\u0120already \u010a mapped \u00c3\u00a9",
    "The  end .  Or is it ?  Yes , it is .",
]

# GPT-4's and Llama 3's pattern.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Written for this file; they use what templates in the wild use.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
              "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Block trimming, a namespace, slices, string methods, a raise that does not happen.
    "turns": """{{ bos_token }}
{%- set ns = namespace(system='', turns=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'].strip() + '\\n\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + (ns.system if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
    {%- set ns.turns = ns.turns + 1 %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    # Loops with break and continue, dictionaries, tests, tojson, lines that Jinja's block trimming eats.
    "kitchen": """{% macro header(role) -%}
[{{ role | upper }}]
{%- endmacro %}
{% for message in messages %}
    {% if message.content is not string %}{% continue %}{% endif %}
    {% if tools is defined and tools and loop.first %}
TOOLS {{ tools | tojson }}
    {% endif %}
{{ header(message.role) }} {{ message.content.split('.')[0] | trim }}{{ '.' if message.content.endswith('.') }}
    {% for key, value in message.items() if key not in ['content'] %}
- {{ key }}={{ value | tojson }}{{ ',' if not loop.last }}
    {% endfor %}
    {% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
{% if not add_generation_prompt %}{{ eos_token }}{% else %}{{ header('assistant') }}{% endif %}""",
}

CONVERSATION = [
    {"role": "system", "content": "  You answer briefly.\n"},
    {"role": "user", "content": "Why is the sky blue? \"Tell\" me <b>why</b>. \u4f60\u597d \U0001f600"},
    {"role": "assistant", "content": "Air scatters short waves of light more than long ones."},
]
QUESTION = CONVERSATION + [{"role": "user", "content": "And at sunset?"}]


def bytelevel(out):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator(PARAGRAPHS, trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATES["chatml"]
    fast.save_pretrained(out, save_jinja_files=False)  # the template inside tokenizer_config.json


def metaspace(out):
    seed = Tokenizer(models.BPE())
    seed.pre_tokenizer = pre_tokenizers.Metaspace()
    # Lines stay out of the training so that, as in the real ones, no merge crosses a line's end.
    lines = [line for p in PARAGRAPHS for line in p.split("\n")]
    seed.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=330, show_progress=False))
    learned = json.loads(seed.to_str())["model"]
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{b:02X}>" for b in range(256)]
    vocab += [piece for piece, _ in sorted(learned["vocab"].items(), key=lambda x: x[1])]
    assert len(vocab) == len(set(vocab)) <= 600
    t = Tokenizer(models.BPE(
        {piece: i for i, piece in enumerate(vocab)}, [tuple(m) for m in learned["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<pad>", "<eos>", "<bos>", "<unk>")])
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATES["turns"]
    fast.save_pretrained(out, save_jinja_files=True)  # the template in chat_template.jinja


def small(out, make):
    shutil.rmtree(out, ignore_errors=True)
    make(out)
    t = tf.PreTrainedTokenizerFast(tokenizer_file=os.path.join(out, "tokenizer.json"), clean_up_tokenization_spaces=False)
    rng = random.Random(5)
    # Ids that no text gave: broken UTF-8 inside, which decodes to replacement characters.
    loose = [[rng.randrange(len(t)) for _ in range(n)] for n in (1, 2, 3, 5, 8, 13, 21, 34)]
    loose += [[1, 40, 2, 300, 1, 2]]
    loose += [[rng.randrange(4, 260) for _ in range(n)] for n in (1, 4, 12)]
    write_json(os.path.join(out, "golden.json"), {
        "made_with": versions(),
        "cases": [
            {"text": text, "ids": ids, "decoded": t.decode(ids, skip_special_tokens=False),
             "with_special_tokens": t.encode(text, add_special_tokens=True)}
            for text in HARD for ids in [t.encode(text, add_special_tokens=False)]
        ],
        "decode_only": [{"ids": ids, "decoded": t.decode(ids, skip_special_tokens=False),
                         "decoded_skip_special": t.decode(ids, skip_special_tokens=True)} for ids in loose],
    })


def real(path, out):
    twin = gguf_twin.load_tokenizer(path)
    theirs = tf.AutoTokenizer.from_pretrained(os.path.dirname(path) or ".", gguf_file=os.path.basename(path))
    cases, apart = [], []
    for i, text in enumerate(HARD):
        ids = twin.encode(text)
        decoded = twin.decode(ids)
        cases.append({"text": text, "ids": ids, "decoded": decoded})
        if theirs.encode(text, add_special_tokens=False) != ids:
            apart.append(i)
    if isinstance(twin, gguf_twin.Gemma):
        merges = twin.as_merges()
        for c in cases:
            assert merges.encode(c["text"], add_special_tokens=False).ids == c["ids"], c["text"]
        print("BPE with recovered merges agrees with SentencePiece on every case")
    cases_lost = [c["text"] for c in cases if c["decoded"] != c["text"]]
    print(f"{os.path.basename(path)}: transformers' GGUF conversion differs on {len(apart)} of {len(HARD)}; "
          f"not decoded to the same text: {cases_lost}")
    write_json(out, {
        "made_with": versions(), "trusted": type(twin).__doc__.replace("\n", " ").replace("    ", ""),
        "cases_where_transformers_gguf_conversion_differs": apart, "cases": cases,
    })


def rendered(tokenizer, template, messages, prompt, **more):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **more)


def chat(out, paths):
    renderer = tf.PreTrainedTokenizerFast(
        tokenizer_file=os.path.join(out, "metaspace", "tokenizer.json"), bos_token="<bos>", eos_token="<eos>")
    tools = [{"type": "function", "function": {"name": "look_up", "description": "Finds <it> & 'more' \u00e9.",
              "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}]
    templates = dict(TEMPLATES)
    for path in paths:
        name = os.path.splitext(os.path.basename(path))[0]
        templates[name] = gguf_twin.field(gguf.GGUFReader(path), "tokenizer.chat_template")
    cases = []
    for name, template in templates.items():
        if template is None:
            continue
        for conversation, messages in (("ends_with_user", QUESTION), ("ends_with_assistant", CONVERSATION),
                                       ("no_system", QUESTION[1:])):
            for prompt in (True, False):
                cases.append({"template": name, "conversation": conversation, "add_generation_prompt": prompt,
                              "tools": False, "rendered": rendered(renderer, template, messages, prompt)})
        if name == "kitchen":
            cases.append({"template": name, "conversation": "ends_with_user", "add_generation_prompt": True,
                          "tools": True, "rendered": rendered(renderer, template, QUESTION, True, tools=tools)})
    write_json(os.path.join(out, "chat.json"), {
        "made_with": versions(), "bos_token": "<bos>", "eos_token": "<eos>",
        "templates": templates, "tools": tools,
        "conversations": {"ends_with_user": QUESTION, "ends_with_assistant": CONVERSATION, "no_system": QUESTION[1:]},
        "cases": cases,
    })


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("models", nargs="*")
    a = parser.parse_args()
    small(os.path.join(a.out, "bytelevel"), bytelevel)
    small(os.path.join(a.out, "metaspace"), metaspace)
    chat(a.out, a.models)
    for path in a.models:
        real(path, os.path.join(a.out, os.path.splitext(os.path.basename(path))[0] + ".json"))


if __name__ == "__main__":
    main()
