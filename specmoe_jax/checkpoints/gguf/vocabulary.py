"""The tokenizer in a GGUF file's metadata: byte-level BPE (gpt2) and sentencepiece's BPE (llama), as one of `tokenizers`."""

import json
import pathlib

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from specmoe_jax.checkpoints.gguf.metadata import GgufFile
from specmoe_jax.checkpoints.header import quote
from specmoe_jax.checkpoints.published.splitters import NORMALISED, SPLITTERS, WHOLE_WORDS
from specmoe_jax.support.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # llama.cpp's kinds of tokens; those of kinds 2 and 3 are special
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
# Of files from before llama.cpp stored the rule, which name none or "default": that of the models of the architecture.
_USUAL = {"qwen2moe": "qwen2", "qwen3moe": "qwen2", "deepseek2": "deepseek-llm", "gpt-oss": "gpt-4o"}


def tokenizer(file: GgufFile) -> tokenizers.Tokenizer:
    """The tokenizer of the metadata. Raises CheckpointError for kinds that are not built."""
    kind = file.fields.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise CheckpointError(f"{file.name}: tokenizer {quote(str(kind))}; built are {', '.join(_KINDS)}")
    backend, begins = _KINDS[kind](file)
    tokens = file.field("tokenizer.ggml.tokens")
    _add_whole_tokens(file, backend, tokens)
    begins = file.fields.get("tokenizer.ggml.add_bos_token", begins)
    ends = file.fields.get("tokenizer.ggml.add_eos_token", False)
    around = [file.field(f"tokenizer.ggml.{key}_token_id") if wanted else None for key, wanted in (("bos", begins), ("eos", ends))]
    if any(token_id is not None for token_id in around):
        named = [(tokens[token_id], token_id) for token_id in around if token_id is not None]
        first, last = ("" if token_id is None else f"{tokens[token_id]}:0" for token_id in around)
        backend.post_processor = processors.TemplateProcessing(single=f"{first} $A:0 {last}".strip(), special_tokens=named)
    return backend


def write_side_files(file: GgufFile, folder: pathlib.Path) -> None:
    """tokenizer.json, and tokenizer_config.json with the chat template. Raises CheckpointError."""
    tokens = file.field("tokenizer.ggml.tokens")
    tokenizer(file).save(str(folder / "tokenizer.json"))
    named = {name: file.fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL_TOKENS.items()}
    raw = {name: tokens[token_id] for name, token_id in named.items() if token_id is not None}
    raw |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    templates = {
        name.removeprefix("tokenizer.chat_template.") if name != "tokenizer.chat_template" else "default": text
        for name, text in file.fields.items()
        if name.startswith("tokenizer.chat_template") and isinstance(text, str)
    }
    if templates:
        several = [{"name": name, "template": text} for name, text in templates.items()]
        raw["chat_template"] = templates["default"] if list(templates) == ["default"] else several
    (folder / "tokenizer_config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")


def _byte_level(file: GgufFile) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2's: the merges are in the file, the way a text is split goes by name. -> (tokenizer, whether BOS is usual)."""
    named = str(file.fields.get("tokenizer.ggml.pre", "default"))
    rule = _USUAL.get(file.architecture, "gpt-2") if named == "default" else _ALIASES.get(named, named)
    if rule not in SPLITTERS:
        raise CheckpointError(
            f"{file.name}: tokenizer gpt2, split by {quote(named)}; built are {', '.join(SPLITTERS)}: take tokenizer.json of the "
            "model's own repository and convert its safetensors"
        )
    vocab = {token: i for i, token in enumerate(file.field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule in WHOLE_WORDS))
    backend.normalizer = normalizers.NFC() if rule in NORMALISED else None
    backend.pre_tokenizer, backend.decoder = SPLITTERS[rule](), decoders.ByteLevel()
    return backend, rule == "llama-bpe"


def _sentencepiece(file: GgufFile) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE that merges what has the best score first; what is no token falls apart into bytes."""
    tokens, scores = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.scores")
    kinds = file.field("tokenizer.ggml.token_type")
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(
            f"{file.name}: {len(tokens)} tokens, {len(scores)} scores, {len(kinds)} kinds; expected as many of each"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    plain = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind not in (UNKNOWN, CONTROL, BYTE)}
    unknown = file.fields.get("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocab=vocab,
        merges=_merges(plain, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in kinds,
    )
    backend = tokenizers.Tokenizer(model)
    prefixed = file.fields.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    stripped = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    return backend, True


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others; the token with the best score first, of equal scores the one with the lower id."""
    found = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[i], i, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_whole_tokens(file: GgufFile, backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    """Tokens that are matched before a text is split: control tokens, which are special, and those that users defined."""
    kinds = file.fields.get("tokenizer.ggml.token_type", [])
    pairs = list(zip(tokens, kinds, strict=False))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind in (UNKNOWN, CONTROL)])
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind == USER_DEFINED])


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
