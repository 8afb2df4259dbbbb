#!/usr/bin/env python3
"""How each family that llama.cpp names in tokenizer.ggml.pre cuts texts into words.

    python make_pre_tokenizers.py tokenizers/pre.json

The patterns are those of llama.cpp's table, or, where its comment gives the model's own tokenizer.json, that one. They are
applied by the `regex` package; `tokenizers` has to cut in the same places with the steps as a tokenizer.json has them.
"""

import json
import sys

import regex
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from common import versions, write_json

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENDS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LLAMA3 = ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def cased(ends, digits, upper=UPPER, lower=LOWER, after="/"):
    start = r"[^\r\n\p{L}\p{N}]?"
    return (f"{start}{upper}*{lower}+{ends}|{start}{upper}+{lower}*{ends}|{digits}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n{after}]*|\s*[\r\n]+|\s+(?!\S)|\s+")


GPT4O = cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}")
HAN = r"&&[^\p{Han}]]"
PUNCT = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
DEEPSEEK = PUNCT + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CJK, CK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CASED = (
    r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d"
    r"\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    r"\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57"
    r"\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    r"\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    r"\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    r"\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    r"\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

FAMILIES = {
    "gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "smaug-bpe": [LLAMA3], "qwen2": [QWEN2], "hunyuan": [QWEN2],
    "qwen35": [ENDS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "jais-2": [ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
               + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"],
    "deepseek-llm": [r"[\r\n]", CASED, r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", CK, r"\p{N}+"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CK, r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", CJK, DEEPSEEK],
    "spark2_5": [r"\p{N}{1,3}", CJK, PUNCT + r"|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"],
    "youtu": ["[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
              "|[\u3105-\u312f]+|" + CJK, cased(ENDS + "?", r"\p{N}")],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"], "bloom": [BLOOM], "viking": [BLOOM, r"\p{N}"],
    "tekken": [cased("", r"\p{N}")],
    "chameleon": ["<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", GPT2],
    "gpt-4o": [GPT4O], "granite-embed-multi-97m": [GPT4O], "tiny_aya": [r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O],
    "kimi-k2": [r"\p{Han}+|" + cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}", UPPER[:-1] + HAN, LOWER[:-1] + HAN, "")],
    "superbpe": [r"\p{N}+", r"(?=(\d{3})+(?!\d))"],
    "bailingmoe": [r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"],
    "seed-coder": [ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "ufakzeka": [QWEN2.removeprefix(ENDS + "|")],
    # llama.cpp has code for the digits: groups of three from the right.
    "afmoe": [None, "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f\u0e80-\u0eff"
              "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+", DEEPSEEK],
    "laguna": [r"[^\n]+|[\n]+", QWEN2],
    "exaone-moe": [ENDS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"],
    "minicpm5": [r"\p{N}{1,3}", ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}

# Every name in llama.cpp's list, of models whose pieces are merged.
NAMES = """default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano deepseek-llm deepseek-coder deepseek-v3
spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jais-2 gemma4
granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35
stablelm2 olmo dbrx smaug-bpe poro-chat glm4 chatglm-bpe viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe
chameleon minerva-7b megrez gpt-4o llama4 kanana2 talkie granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling bailingmoe
bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka grok-2 afmoe laguna minimax-m2 solar-open
mellum2""".split()

TEXTS = [
    "", "Hello world", " hello  world ", "I'm sure we'LL see THEY'VE gone, don't we? O'Brien's 'em", "it's'S 're'RE\u2019s",
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 \u0663\u0664\u0665\u0666", "x=1;y<=22>>3 && z!=0 || w^~$5 `a` #b @c %d",
    "def f(x):\n\treturn x**2  # doubled\r\n\r\n    if y:\n\n\n        pass   ", "\n\n a\n \n b \r\n", "tabs\t\t\tand    spaces        eight",
    "camelCaseHTTPServer ABCdefGHI \u00c4pfel \u00dcBER\u00c4LL stra\u00dfe \u01c5abc", "\u4eca\u65e5\u306f\u3068\u3066\u3082\u6691\u3044\u3067\u3059\u3002\u660e\u65e5\u3082\uff01 \u6211\u4eec2024\u5e74\u53bb\u5317\u4eac\uff0c\u597d\u5417\uff1f",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4! \u3131\u3134 \u1112\u1161\u11ab", "\u0645\u0631\u062d\u0628\u0627\u060c \u0627\u0644\u0633\u0651\u064e\u0644\u0627\u0645\u064f \u06d4", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e\u0964 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0e4111 \u1780\u17d2\u1798",
    "cafe\u0301 nai\u0308ve e\u0323\u0302", "\U0001f600\U0001f680 ok\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7", "\u00a0no-break\u2003em \u3000wide\u3000", "\u201cquotes\u201d \u2018x\u2019 \u2014 \u2026 \u00abg\u00bb \u00bfqu\u00e9?",
    "http://a.b/c?d=e&f=1/2/3\n/path/to//file", "((())) [[x]] {{y}} ... --- ___ <sentinel:12> IMGIMGABIZ", "\u041c\u043e\u0441\u043a\u0432\u0430 \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0531\u0562\u0563 \u10d0\u10d1\u10d2 \u13a0\u13a1",
    "a  b   c    d     e      f", "  leading\n  \ttrailing  \n  ", "x" + " " * 70 + "y" + " " * 40, "end \n",
]


def digits(text):
    """Runs of digits in threes from the right; what is between stays."""
    out = []
    for piece in regex.split(r"(\p{N}+)", text):
        if regex.fullmatch(r"\p{N}+", piece):
            first = len(piece) % 3
            out += [piece[:first]] + [piece[i:i + 3] for i in range(first, len(piece), 3)]
        else:
            out.append(piece)
    return [p for p in out if p]


def cut(pieces, pattern):
    if pattern is None:
        return [p for piece in pieces for p in digits(piece)]
    out = []
    for piece in pieces:
        at = 0
        for m in regex.finditer(pattern, piece, flags=regex.V1):
            if m.start() > at:
                out.append(piece[at:m.start()])
            if m.end() > m.start():
                out.append(m[0])
            at = m.end()
        if at < len(piece):
            out.append(piece[at:])
    return out


def ends(pieces):
    at, out = 0, []
    for p in pieces:
        at += len(p)
        out.append(at)
    return out


def steps_of(name, patterns):
    """As a tokenizer.json of the family has them: Digits where it is a step of that kind, GPT-2's words inside ByteLevel."""
    steps, words = [], False
    for i, p in enumerate(patterns):
        if p == GPT2 and i == len(patterns) - 1:
            words = True
        elif p == r"\p{N}":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            if p is None:
                p = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
            elif p == GPT2:
                p += r"|\s+"
            elif name == "kimi-k2":
                p = "[" + r"\p{Han}" + "]" + p.removeprefix(r"\p{Han}")
            elif name == "bailingmoe":
                p = "'(?i:[sdmt]|ll|ve|re)" + p[p.index("|[^"):]
            # `regex` knows escapes of letters, Oniguruma the letters themselves.
            p = regex.sub(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})", lambda m: chr(int(m[1] or m[2], 16)), p)
            steps.append(pre_tokenizers.Split(Regex(p), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words))
    return pre_tokenizers.Sequence(steps)


def main():
    families = []
    for name, patterns in FAMILIES.items():
        theirs = steps_of(name, patterns)
        cuts = []
        for text in TEXTS:
            pieces = [text] if text else []
            for p in patterns:
                pieces = cut(pieces, p)
            assert "".join(pieces) == text
            got = [end for _, (_, end) in theirs.pre_tokenize_str(text)]
            if got != ends(pieces):
                sys.exit(f"{name}: {text!r}: regex {pieces}, tokenizers {[text[a:b] for _, (a, b) in theirs.pre_tokenize_str(text)]}")
            cuts.append(ends(pieces))
        t = Tokenizer(models.BPE())
        t.pre_tokenizer = theirs
        families.append({"name": name, "pre_tokenizer": json.loads(t.to_str())["pre_tokenizer"], "cuts": cuts})
    write_json(sys.argv[1], {"made_with": versions(), "names": NAMES, "texts": TEXTS, "families": families})


if __name__ == "__main__":
    main()
