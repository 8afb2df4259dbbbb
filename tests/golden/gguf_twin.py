"""The two real models as GGUF files, read by other people's code: weights through the `gguf` package into transformers'
classes, tokenizers through the `tokenizers` and `sentencepiece` libraries."""

import copy
import re

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers as tf
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

# Token types of a GGUF vocabulary.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def field(reader, name, default=None):
    return reader.fields[name].contents() if name in reader.fields else default


# --- weights -------------------------------------------------------------------------------------------------------

LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
LLAMA_LAYER = {**LAYER, "ffn_norm.weight": "post_attention_layernorm.weight"}
GEMMA3_LAYER = {
    **LAYER,
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def interleaved_to_halves(w, heads):
    """GGUF's Llama stores the rows of queries and keys for rotation of neighbours (2i, 2i + 1); transformers rotates
    halves (i, i + d/2)."""
    d = w.shape[0] // heads
    return w.reshape(heads, d // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def config(reader):
    arch = field(reader, "general.architecture")

    def get(name, default=None):
        return field(reader, f"{arch}.{name}", default)

    vocab = len(field(reader, "tokenizer.ggml.tokens"))
    common = dict(
        vocab_size=vocab, hidden_size=get("embedding_length"), intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"), num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"), max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"), rope_theta=get("rope.freq_base"),
        tie_word_embeddings=True, use_cache=False,
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=field(reader, "tokenizer.ggml.padding_token_id"),
    )
    if arch == "llama":
        return tf.LlamaConfig(**common)
    if arch == "gemma3":
        # The file does not state these: they are the architecture's own. Every sixth layer is global; local
        # layers rotate with base 10000; scores are divided by sqrt(head_dim).
        layers = common["num_hidden_layers"]
        head_dim = get("attention.key_length")
        return tf.Gemma3TextConfig(
            **common, head_dim=head_dim, query_pre_attn_scalar=head_dim, sliding_window=get("attention.sliding_window"),
            rope_local_base_freq=10000.0, hidden_activation="gelu_pytorch_tanh",
            layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)])
    raise SystemExit(f"architecture {arch} is not one of llama, gemma3")


def state_dict(reader, cfg):
    gemma = isinstance(cfg, tf.Gemma3TextConfig)
    layer = GEMMA3_LAYER if gemma else LLAMA_LAYER
    out = {}
    for t in reader.tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        if t.name.startswith("blk."):
            _, index, rest = t.name.split(".", 2)
            name = f"model.layers.{index}.{layer[rest]}"
        else:
            name = OUTER[t.name]
        if not gemma and name.endswith("q_proj.weight"):
            w = interleaved_to_halves(w, cfg.num_attention_heads)
        if not gemma and name.endswith("k_proj.weight"):
            w = interleaved_to_halves(w, cfg.num_key_value_heads)
        if gemma and "norm" in name:
            w = w - np.float32(1)  # GGUF stores 1 + w, transformers adds the one itself
        out[name] = torch.from_numpy(np.ascontiguousarray(w))
    return out


def load_model(path):
    """The model in f32 with eager attention."""
    reader = gguf.GGUFReader(path)
    cfg = config(reader)
    cfg._attn_implementation = "eager"
    cls = tf.Gemma3ForCausalLM if isinstance(cfg, tf.Gemma3TextConfig) else tf.LlamaForCausalLM
    with torch.device("meta"):
        model = cls(cfg)
    missing, unexpected = model.load_state_dict(state_dict(reader, cfg), strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    # Rotary tables are no parameters; on the meta device they were never filled.
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(cfg)
    if hasattr(model.model, "rotary_emb_local"):
        local = copy.deepcopy(cfg)
        local.rope_theta, local.rope_scaling = cfg.rope_local_base_freq, {"rope_type": "default"}
        model.model.rotary_emb_local = rotary(local)
    for module in model.modules():
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(cfg.hidden_size**0.5)
    left = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    assert not left, left
    return model.eval()


# --- tokenizers ----------------------------------------------------------------------------------------------------


class SmolLM:
    """Byte-level BPE as the model's own tokenizer.json has it: every digit alone, then GPT-2's pattern."""

    def __init__(self, reader):
        tokens = field(reader, "tokenizer.ggml.tokens")
        types = field(reader, "tokenizer.ggml.token_type")
        merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
        assert field(reader, "tokenizer.ggml.pre") == "smollm"
        self.t = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        self.t.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
        self.t.decoder = decoders.ByteLevel()
        self.t.add_special_tokens(
            [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types) if k == CONTROL])
        self.bos = None

    def encode(self, text):
        return self.t.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.t.decode(ids, skip_special_tokens=False)


class Gemma:
    """The file's pieces and scores handed back to the SentencePiece library itself, which is what the model was trained
    with. Control tokens inside the text are found first, as transformers and llama.cpp (parse_special) do."""

    def __init__(self, reader):
        self.tokens = field(reader, "tokenizer.ggml.tokens")
        types = field(reader, "tokenizer.ggml.token_type")
        scores = field(reader, "tokenizer.ggml.scores")
        unknown = field(reader, "tokenizer.ggml.unknown_token_id")
        assert not field(reader, "tokenizer.ggml.add_space_prefix")
        proto = sentencepiece_model_pb2.ModelProto()
        for i, (token, score, kind) in enumerate(zip(self.tokens, scores, types)):
            # The file spells user-defined runs of spaces with plain spaces.
            piece = token.replace(" ", "\u2581") if kind == USER_DEFINED else token
            proto.pieces.add(piece=piece, score=score, type=UNKNOWN if i == unknown else kind)
        trainer = proto.trainer_spec
        trainer.model_type = trainer.BPE
        trainer.vocab_size = len(self.tokens)
        trainer.byte_fallback = True
        trainer.unk_id, trainer.unk_piece = unknown, self.tokens[unknown]
        trainer.bos_id = field(reader, "tokenizer.ggml.bos_token_id")
        trainer.bos_piece = self.tokens[trainer.bos_id]
        trainer.eos_id = field(reader, "tokenizer.ggml.eos_token_id")
        trainer.eos_piece = self.tokens[trainer.eos_id]
        trainer.pad_id, trainer.pad_piece = 0, self.tokens[0]
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        proto.normalizer_spec.escape_whitespaces = True
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.types, self.scores = types, scores
        self.control = {t: i for i, (t, k) in enumerate(zip(self.tokens, types)) if k == CONTROL}
        self.bos = trainer.bos_id

    def encode(self, text):
        ids, at = [], 0
        for found in re.finditer("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))), text):
            ids += self.sp.encode(text[at:found.start()]) + [self.control[found.group()]]
            at = found.end()
        return ids + self.sp.encode(text[at:])

    def as_merges(self):
        """The same tokenizer in the form of a tokenizer.json, as the published one: BPE with merges, recovered from the
        pieces. A second way to the same ids; nothing but `encode` is meant to be used of it."""
        pieces = [t.replace(" ", "\u2581") if k == USER_DEFINED else t for t, k in zip(self.tokens, self.types)]
        vocab = {p: i for i, p in enumerate(pieces)}
        merges = []
        for piece, kind, score in zip(pieces, self.types, self.scores):
            if kind == NORMAL:
                cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
                merges += [(-score, vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab]
        merges.sort(key=lambda m: m[:3])
        t = tokenizers.Tokenizer(models.BPE(
            vocab, [m[3:] for m in merges], unk_token=self.tokens[self.sp.unk_id()], fuse_unk=True, byte_fallback=True))
        t.normalizer = normalizers.Replace(" ", "\u2581")
        t.add_tokens([
            # A run of spaces must be found after the normalizer has turned it into underlines.
            AddedToken(p, normalized=p.startswith("\u2581"), special=k == CONTROL)
            for p, k in zip(pieces, self.types) if k in (CONTROL, USER_DEFINED)])
        return t

    def decode(self, ids):
        raw = b""
        for i in ids:
            token = self.tokens[i]
            raw += bytes([int(token[3:5], 16)]) if self.sp.is_byte(i) else token.replace("\u2581", " ").encode()
        return raw.decode("utf-8", errors="replace")


def load_tokenizer(path):
    reader = gguf.GGUFReader(path)
    return SmolLM(reader) if field(reader, "tokenizer.ggml.model") == "gpt2" else Gemma(reader)
