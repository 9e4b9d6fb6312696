#!/usr/bin/env python3
"""Make reference.json with the pinned libraries: `reference.py TOKENIZER_DIR > reference.json`.

TOKENIZER_DIR: golden-a's tokenizer-tiny. Needs transformers==4.31.0, sentencepiece==0.1.99, protobuf<=3.20 or
PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python.
"""

import json
import random
import sys
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaTokenizer

LOCATIONS = ["<grounding>", "<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<REC>"]
MARKS = ["[IMG]", "[/IMG]", "<image>", "[gIMG]", "[/gIMG]", "[EOC]", "[VIDEO]"]
PATCHES = [f"<patch_index_{i:04}>" for i in range(257)]
SPECIALS = ["<s>", "</s>", "<unk>", "[PAD]"] + MARKS + LOCATIONS + PATCHES[:2] + ["[USER]", "[ASSISTANT]"]
SPACES = [" ", "  ", "\n", "\t", "\x1c", "\x1f", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b", "\u2581", "\0"]
WORDS = ["a", "dog", "the", "There are", "in", "café", "ï", "世界", "🐶", "123", "<", ">", "[", "]", "<<s>", "[[IMG]]",
         "<s", "</", "<patch_index_0257>", "<0x41>", "[IMG", "</phrase", "x", "xx", ".", "…", "\ufffd", "\ue000"]  # fmt: skip
# Piece types of sentencepiece_model.proto.
USER_DEFINED, UNUSED = 4, 5


def main(folder):
    random.seed(7)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({
        "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>",
        "additional_special_tokens": MARKS + LOCATIONS + PATCHES + ["[USER]", "[ASSISTANT]"],
    })  # fmt: skip
    pools = [SPECIALS, SPACES, WORDS, WORDS]
    texts = ["".join(random.choice(random.choice(pools)) for _ in range(random.randint(1, 12))) for _ in range(150)]
    lists = [[some_id(tokenizer) for _ in range(random.randint(1, 14))] for _ in range(250)]
    result = {
        "encode": [{"text": text, "ids": tokenizer(text).input_ids} for text in texts],
        "decode": [{"ids": ids, "skip": decode(tokenizer, ids, True), "all": decode(tokenizer, ids, False)} for ids in lists],
        "kinds": [kinds(folder, USER_DEFINED), kinds(folder, UNUSED)],
    }
    print("{")
    for name, rows in result.items():
        print(f' "{name}": [')
        print(",\n".join("  " + json.dumps(row) for row in rows))
        print(" ]" + ("," if name != "kinds" else ""))
    print("}")


def some_id(tokenizer):
    pick = random.random()
    if pick < 0.3:
        emoji = "é世🐶\ufffd".encode() + bytes([0xC0, 0xE0, 0xED, 0xF4, 0xFF, 0x80, 0x41])
        return 3 + random.choice(emoji)
    if pick < 0.5:
        return tokenizer.convert_tokens_to_ids(random.choice(SPECIALS))
    if pick < 0.6:
        return tokenizer.sp_model.piece_to_id("\u2581")
    return random.randrange(len(tokenizer))


def decode(tokenizer, ids, skip):
    return tokenizer.batch_decode([ids], skip_special_tokens=skip)[0]


def kinds(folder, kind):
    """Encodings by the same model with some of its pieces of another type."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(Path(folder, "tokenizer.model").read_bytes())
    longer = [i for i, piece in enumerate(model.pieces) if piece.type == 1 and len(piece.piece) > 1]
    changed = random.sample(longer, 60)
    for i in changed:
        model.pieces[i].type = kind
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    pieces = [model.pieces[i].piece.replace("\u2581", " ") for i in longer]
    texts = ["".join(random.choice(pieces) for _ in range(random.randint(1, 9))) for _ in range(60)]
    return {"kind": kind, "pieces": sorted(changed), "cases": [{"text": t, "ids": processor.encode(t)} for t in texts]}


if __name__ == "__main__":
    main(sys.argv[1])
