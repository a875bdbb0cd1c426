"""How byte-level BPE tokenizers split a text before they merge: the rules of published tokenizers, by llama.cpp's names.

A tokenizer.json holds its own rule. GGUF files name one, and tiktoken files leave it to the code of the model.
"""

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST


def _cased(others: str) -> str:
    """Words that end where lower case ends. others: of the letters, which are left to another rule."""
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{others}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{others}]"
    start, end = r"[^\r\n\p{L}\p{N}]?", f"{_CONTRACTIONS}?"
    return f"{start}{upper}*{lower}+{end}|{start}{upper}+{lower}*{end}"


_GPT4O = _cased("") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
_KIMI = r"[\p{Han}]+|" + _cased(r"&&[^\p{Han}]") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _REST,
)
# The published rule lists the letters that have case, one by one; Georgian ones had none when it was written.
_DEEPSEEK = (
    r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^ა-ჿ]]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)  # fmt: skip


def _regular(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Each match of each expression in turn apart; then bytes."""
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


SPLITTERS = {
    "gpt-2": _gpt2,
    "smollm": lambda: _gpt2(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: _regular(_LLAMA3),
    "qwen2": lambda: _regular(_QWEN2),
    "gpt-4o": lambda: _regular(_GPT4O),
    "kimi-k2": lambda: _regular(_KIMI),
    "deepseek-llm": lambda: _regular(*_DEEPSEEK),
    "deepseek-v3": lambda: _regular(*_DEEPSEEK3),
}
NORMALISED = ("qwen2",)  # texts are brought into Unicode's form NFC first
WHOLE_WORDS = ("llama-bpe", "gpt-4o", "kimi-k2")  # a piece that is a token as it is is not merged from bytes
