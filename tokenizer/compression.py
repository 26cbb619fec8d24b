"""How well a vocabulary compresses: bytes of UTF-8 per token, by kind of text.

The samples were written for this table, so that no corpus holds them. Beside them stands GPT-2's vocabulary (r50k,
50,257 pieces, trained on WebText): the counts below were made once with its published merges (vocab.bpe, SHA-256
1ce16647…26adc5) and its published splitting pattern; the same program gives nanoGPT's published 301,966 + 36,059 tokens
on tiny Shakespeare.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tokenizer.tokenizer import Tokenizer

SAMPLES = {
    "Python code": '''\
def moving_average(values, width):
    """Mean of each window of `width` consecutive values, as a list.

    Raises ValueError where the width is not between 1 and the number of values.
    """
    if not 1 <= width <= len(values):
        raise ValueError(f"width must lie between 1 and {len(values)}, not {width}")
    total = sum(values[:width])
    means = [total / width]
    for i in range(width, len(values)):
        total += values[i] - values[i - width]
        means.append(total / width)
    return means


class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self._balance = balance

    @property
    def balance(self):
        return self._balance

    def withdraw(self, amount):
        if amount > self._balance:
            raise ValueError("the account does not hold that much")
        self._balance -= amount
        return self._balance
''',
    "English prose": (
        "The ferry left before sunrise, when the harbour was still grey and the gulls had not begun to quarrel. Nobody "
        "spoke much. A woman with two baskets of pears sat near the engine, where it was warm, and a boy leaned over "
        "the rail to see whether the water was really as black as his grandfather had promised. Halfway across, the "
        "wind turned and brought the smell of bread from the island, so that everyone looked up at once and laughed. "
        "By the time we tied up at the stone pier the sun had reached the church tower, the baker was sweeping his "
        "step, and the whole village seemed to have been waiting for us, although of course it had only been waiting "
        "for the pears.\n"
    ),
    "Chinese prose": (
        "清晨的渡船在日出之前离开了港口，海面还是灰色的，海鸥也没有开始争吵。船上几乎没有人说话。一位妇人带着两篮梨，"
        "坐在靠近机器的地方，因为那里比较暖和；一个男孩靠在栏杆上，想看看海水是不是真的像爷爷说的那样黑。走到一半的时候，"
        "风向变了，带来了岛上面包的香味，大家都抬起头，一起笑了起来。\n"
    ),
    "numbers": (
        "1999-12-31 23:59:58, 3.14159, 2.71828e-05, 1048576, 65535, -273.15, 0x7fff, 100%, 299792458, 6.02214076e23\n"
        "17 4096 31337 8.5 12,345,678 90210 0.0625 440 1/3 2**64 192.168.0.254 +49 30 901820 007 1e-8 50257 42 "
        "365.2425\n"
    ),
    "white space": (
        "name\t\tcount\tshare\n"
        "alpha           12      0.30\n"
        "beta             9      0.23\n"
        "\n"
        "    - first\n"
        "        - nested\n"
        "            - deeper\n"
        "                - deepest\n"
        "\n\n\n"
        "                                        centred\r\n"
        "\r\n"
        "   three   spaces   between   words   \n"
    ),
    "JSON": (
        '{"id": 381, "user": {"name": "mara", "roles": ["admin", "editor"], "active": true}, "items": '
        '[{"sku": "A-104", "price": 12.5, "tags": null}, {"sku": "B-7", "price": 3, "tags": ["new", "sale"]}], '
        '"created_at": "2024-05-17T08:30:00Z", "next": "https://example.org/api/v1/orders?page=2"}\n'
    ),
    "emoji, symbols": "👩‍👩‍👧‍👦 arrived 🎉🎉, 温度 −4 °C → ½ cup ☕ & naïve café ≠ résumé; ∀x∈ℝ: x² ≥ 0 ✓ 🇳🇴🏳️‍🌈\n",
}
"""Kind of text → a sample of it."""

GPT2_TOKENS = {
    "Python code": 335,
    "English prose": 144,
    "Chinese prose": 302,
    "numbers": 110,
    "white space": 161,
    "JSON": 123,
    "emoji, symbols": 75,
}
"""Kind → tokens that GPT-2's vocabulary takes for the sample."""


class Row(NamedTuple):
    """One kind of text. `tokens` and `bytes_per_token` are None where a character-level tokenizer lacks a character."""

    kind: str
    bytes: int
    tokens: int | None
    bytes_per_token: float | None
    gpt2_bytes_per_token: float | None
    """None for texts other than the samples."""


def compression(tokenizer: Tokenizer, texts: Mapping[str, str] = SAMPLES) -> list[Row]:
    """A row for each of `texts` (kind → text); empty texts are left out."""
    return [_row(tokenizer, kind, text) for kind, text in texts.items() if text]


def _row(tokenizer: Tokenizer, kind: str, text: str) -> Row:
    size = len(text.encode())
    gpt2 = size / GPT2_TOKENS[kind] if SAMPLES.get(kind) == text else None
    try:
        tokens = len(tokenizer.encode(text))
    except ValueError:  # an unseen character
        return Row(kind, size, None, None, gpt2)
    return Row(kind, size, tokens, size / tokens, gpt2)


def table(rows: list[Row]) -> str:
    """The rows as aligned text; a dash stands for None."""
    lines = [f"{'kind of text':<24}{'bytes':>12}{'tokens':>12}{'bytes/token':>14}{'GPT-2':>8}"]
    for row in rows:
        tokens = "–" if row.tokens is None else f"{row.tokens:,}"
        own = "–" if row.bytes_per_token is None else f"{row.bytes_per_token:.2f}"
        gpt2 = "–" if row.gpt2_bytes_per_token is None else f"{row.gpt2_bytes_per_token:.2f}"
        lines.append(f"{row.kind:<24}{row.bytes:>12,}{tokens:>12}{own:>14}{gpt2:>8}")
    return "\n".join(lines)
