#!/usr/bin/env python3
"""Records what the C tokenizer is compared with, from Hugging Face `tokenizers` (and checks tiktoken where installed).
    record_tokenizer.py classes     writes llmc/data/tokenizer_classes.c: the Unicode classes as the peers' pattern has them
    record_tokenizer.py goldens     writes dev/test/golden/tokenizer_hf/
    record_tokenizer.py compare TOKENIZE [N [SEED]]  compares the program TOKENIZE with HF, and with tiktoken where installed, now:
                                    N random texts and N/20 trainings; prints one line, exits 1 on a difference
"""
import json
import os
import random
import subprocess
import sys
import tempfile
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

GOLDEN = "dev/test/golden/tokenizer_hf"
END = "<|endoftext|>"

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def pieces(text):
    return len(BYTE_LEVEL.pre_tokenize_str(text))


def char_class(c):
    """The class of a code point: which neighbour the pattern keeps it together with."""
    if 0xD800 <= c < 0xE000:
        return "O"
    for neighbour, name in (("x", "L"), ("1", "N"), ("!", "O")):
        if pieces(neighbour + chr(c)) == 1:
            return name
    return "S"


def ranges(classes, name):
    """first << 8 | length - 1, lengths up to 256."""
    out, c = [], 0
    while c < len(classes):
        if classes[c] != name:
            c += 1
            continue
        first = c
        while c < len(classes) and classes[c] == name and c - first < 256:
            c += 1
        out.append(first << 8 | (c - first - 1))
    return out


def write_classes(path):
    classes = [char_class(c) for c in range(0x110000)]
    with open(path, "w") as f:
        f.write("/* Made by dev/reference/record_tokenizer.py from Hugging Face tokenizers (Unicode 16); tiktoken has the same classes.\n"
                " * Entries: first << 8 | length - 1. Not for reading: see tokenizer_internal.h. */\n"
                '#include "tokenizer_internal.h"\n')
        for name, variable in (("L", "unicode_letters"), ("N", "unicode_numbers"), ("S", "unicode_spaces")):
            r = ranges(classes, name)
            f.write(f"\nconst uint32_t {variable}[] = {{\n")
            for i in range(0, len(r), 10):
                f.write("    " + " ".join(f"0x{v:08x}," for v in r[i:i + 10]) + "\n")
            f.write(f"}};\nconst size_t n_{variable} = {len(r)};\n")


# ---- goldens ----

SENTENCES = """
The model reads one token after another, and what it can't know it guesses; that's all it'll ever do.
We've 3 cups, 12 plates and 1,024 spoons: they're hers, I'd say, but don't quote me -- it's 99.5% true!
for (int i = 0; i < n; i++) { sum += x[i] * w[i]; }\t// the dot product\n\n\treturn sum;
El zorro veloz salta sobre el perro perezoso; mañana también saltará. ¿Verdad? ¡Sí!
Die Füße der großen Bären über dem Fluß, schön und kühl. Straße, Übung, Öl.
Сегодня хорошая погода, и мы пойдём гулять в парк. Завтра будет 25 градусов.
Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.
今日は天気がいいので、公園へ散歩に行きます。明日は雨でしょう。
今天天气很好，我们去公园散步。明天会下雨吗？
오늘은 날씨가 좋아서 공원에 산책하러 갑니다.
اليوم الطقس جميل وسنذهب إلى الحديقة. ١٢٣
आज मौसम अच्छा है और हम पार्क में घूमने जाएंगे। १२३
वन्‍दे, naïve café, cafe\u0301, ﬁne ½ ² Ⅷ ① x² + y² = z²
😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 are one, four, two and one; \u00a0non-breaking\u2003spaces\u3000too
""".strip().split("\n")


def training_text():
    """About 60 kB: the sentences, and words drawn from them again and again."""
    r = random.Random(20240520)
    lines = list(SENTENCES)
    words = [w for s in lines for w in s.split(" ")]
    out = list(lines)
    for _ in range(500):
        out.append(" ".join(r.choice(words) for _ in range(r.randrange(3, 20))) + r.choice(["", ".", "  ", "\r", "\n\n"]))
    return "\n".join(out) + "\n"


def train(text, size):
    """A HF tokenizer of `size` tokens, <|endoftext|> last."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = BYTE_LEVEL
    t.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size - 1, min_frequency=2, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return t


def merges_of(t):
    return [" ".join(m) if isinstance(m, list) else m for m in json.loads(t.to_str())["model"]["merges"]]


TRICKY = ["", " ", "  ", "   x", "x   ", "\n", "\n\n", " \n x", "a\n\n\nb", "\t\tx", "\r\n\r\nx", "it's", "it'S", "'s", " 's", "''s", "'sa",
          "we'll've", "'ll 're 've 'd 'm 't", "'l", "'r", "'v'", "don\u2019t", "x'", "x' y", "1'st", "a1b2", "12 34", " 1", "  1", "!!", " !!", "  !!",
          "!a", "a!", "!1", "1!", "\u0085", "a\u0085b", "a \u0085 b", "\u180e", "a\u180eb", " \u180e", "\x1c\x1d\x1e\x1f", "a\x1cb", "\u200b", "a\u200bb",
          "\ufeff", "\ufeffThe", "\u00a0", "a\u00a0b", " \u00a0 b", "\u3000\u3000x", "\u2028\u2029", "\x00", "a\x00b", "\x7f", "\u0300", "e\u0301", "\u20e3",
          "1\ufe0f\u20e3", "½", "²", "Ⅷ", "x²", "①②", "۱۲۳", "𝟘𝟙", "𠀀", "😀😀", "👩\u200d👧", "\U0010ffff", "\ue000", "\u0378", "\U000e0041", "ǅ", "ª", "ʰ", "ـ",
          END, "a" + END + "b", "Ġ", "ĠĠ", "Ċ", "a" * 47, "a" * 48, "a" * 49, "a" * 500, " " * 500 + "x", "ab" * 300, "=" * 200, "\n" * 100, "あ" * 100]


def random_text(r):
    kind = r.randrange(4)
    n = r.randrange(1, 40)
    if kind == 0:
        return "".join(r.choice(" 'sdmtlver1!\n\tA\u00a0é中") for _ in range(n))
    if kind == 1:
        return "".join(chr(r.choice([r.randrange(0x80), r.randrange(0x800), r.randrange(0xD800), r.randrange(0xE000, 0x110000)])) for _ in range(n))
    if kind == 2:
        return " ".join(r.choice(SENTENCES)[a:a + r.randrange(1, 12)] for a in (r.randrange(30) for _ in range(n)))
    return "".join(r.choice(["  ", " ", "'s", "x", "\n", "🏽", "ß", "7", "\u2003", "--", "'"]) for _ in range(n))


def code_point_text(c):
    s = chr(c)
    return f"{s}a{s}b{s}{s} {s}1{s}\n{s}  {s}'s{s}!{s}'{s}"


def fnv(ids, h=0xCBF29CE484222325):
    for i in ids:
        h = ((h ^ i) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def code_point_hashes(t):
    """One hash a block of 4096 code points, over the ids of code_point_text."""
    lines = []
    for block in range(0, 0x110000, 4096):
        h = 0xCBF29CE484222325
        for e in t.encode_batch([code_point_text(c) for c in range(block, block + 4096) if not 0xD800 <= c < 0xE000]):
            h = fnv(e.ids, h)
        lines.append(f"{h:016x}")
    return lines


def training_cases():
    """Small alphabets make many ties, and tokens that two different merges build."""
    r = random.Random(7)
    for alphabet, n, size in (("ab", 400, 300), ("ab ", 2000, 400), ("abc ", 3000, 500), ("aab", 600, 320), ("ab1!' \n", 3000, 450), ("aé中 ", 2000, 420)):
        yield "".join(r.choice(alphabet) for _ in range(n)), size
    yield "a" * 1000, 300
    yield "", 300
    yield "no pair here occurs twic", 300


def write_goldens():
    os.makedirs(GOLDEN, exist_ok=True)
    text = training_text()
    with open(f"{GOLDEN}/text.txt", "w", encoding="utf-8", newline="") as f:
        f.write(text)
    t = train(text, 1000)
    t.model.save(GOLDEN)
    r = random.Random(11)
    strings = TRICKY + [random_text(r) for _ in range(300)]
    with open(f"{GOLDEN}/strings.json", "w") as f:
        f.write("[" + ",\n".join(json.dumps([s, t.encode(s).ids]) for s in strings) + "]\n")
    with open(f"{GOLDEN}/codepoints.txt", "w") as f:
        f.write("\n".join(code_point_hashes(t)) + "\n")
    with open(f"{GOLDEN}/training.json", "w") as f:
        f.write("[" + ",\n".join(json.dumps([s, size, merges_of(train(s, size))]) for s, size in training_cases()) + "]\n")
    t.add_special_tokens([END])
    t.save(f"{GOLDEN}/tokenizer.json", pretty=False)


# ---- live comparison ----

def read_shard(path):
    raw = open(path, "rb").read()
    magic, width = int.from_bytes(raw[:4], "little"), {20240520: 2, 20240801: 4}
    step = width[magic]
    return [int.from_bytes(raw[i:i + step], "little") for i in range(1024, len(raw), step)]


def program(*words):
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{words[0]} {words[1]}: {done.stderr}")


def tiktoken_of(t):
    """tiktoken ranks tokens by id: the same thing where merges are in the order of ids."""
    try:
        import tiktoken
    except ImportError:
        return None
    byte_of = {c: b for b, c in byte_alphabet().items()}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in t.get_vocab(with_added_tokens=False).items()}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding("compare", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def byte_alphabet():
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in keep]
    return {**{b: chr(b) for b in keep}, **{b: chr(256 + i) for i, b in enumerate(other)}}


def compare_encoding(tokenize, folder, r, n):
    t = Tokenizer.from_file(f"{GOLDEN}/tokenizer.json")
    end = t.token_to_id(END)
    tik = tiktoken_of(t)
    texts = [x for x in (random_text(r) for _ in range(n)) if x and END not in x]
    names = []
    for i, text in enumerate(texts):
        names.append(f"{folder}/{i}.txt")
        with open(names[-1], "w", encoding="utf-8", newline="") as f:
            f.write(text)
    program(tokenize, "encode", "--tokenizer", f"{GOLDEN}/tokenizer.json", "--document-marker", "none", "--out", f"{folder}/out.bin", *names)
    ours = read_shard(f"{folder}/out.bin")
    wanted = [i for text in texts for i in [end, *t.encode(text).ids]]
    if ours != wanted:
        return f"ids differ from Hugging Face's (seed-dependent texts; {len(ours)} and {len(wanted)} ids)"
    if tik and ours != [i for text in texts for i in [end, *tik.encode_ordinary(text)]]:
        return "ids differ from tiktoken's"
    return None


def compare_training(tokenize, folder, r):
    alphabet = r.choice(["ab", "ab ", "abc ", "aab", "ab1!' \n", "aé中 ", "abcdefgh    ", "aaaaab "])
    text = "".join(r.choice(alphabet) for _ in range(r.randrange(1, 5000)))
    size = r.randrange(257, 700)
    with open(f"{folder}/train.txt", "w", encoding="utf-8", newline="") as f:
        f.write(text)
    program(tokenize, "train", "--vocab-size", str(size), "--out", f"{folder}/t", f"{folder}/train.txt")
    with open(f"{folder}/t/merges.txt", encoding="utf-8") as f:
        ours = f.read().split("\n")[1:-1]
    with open(f"{folder}/t/vocab.json", encoding="utf-8") as f:
        vocabulary = json.load(f)
    theirs = train(text, size)
    if ours != merges_of(theirs):
        return f"merges differ: alphabet {alphabet!r}, {len(text)} characters, vocabulary {size}"
    expected = theirs.get_vocab()
    expected[END] = len(expected)
    return None if vocabulary == expected else f"vocabularies differ: alphabet {alphabet!r}, {len(text)} characters, vocabulary {size}"


def compare(tokenize, n=1000, seed=1):
    r = random.Random(int(seed))
    with tempfile.TemporaryDirectory() as folder:
        problems = [compare_encoding(tokenize, folder, r, int(n))] + [compare_training(tokenize, folder, r) for _ in range(int(n) // 20)]
    problems = [p for p in problems if p]
    print(problems[0] if problems else f"equal: {n} texts and {int(n) // 20} trainings, tiktoken {'too' if 'tiktoken' in sys.modules else 'not installed'}")
    return 1 if problems else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["classes"]:
        write_classes("llmc/data/tokenizer_classes.c")
    elif sys.argv[1:] == ["goldens"]:
        write_goldens()
    elif len(sys.argv) > 2 and sys.argv[1] == "compare":
        sys.exit(compare(*sys.argv[2:]))
    else:
        sys.exit(__doc__)
