"""Saved tokenizers are the same tokenizer in transformers, beside any model's configuration."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fivefold.parallel_core.training.tokenizer import ByteTokenizer, FileTokenizer

TEXTS = ["", "plain text .", " a  , b \r\n\tdon't", "naïve 東京 🙂 \u0000\u0301", "<x>\n" * 9]


@pytest.mark.parametrize("model_type", [None, "mixtral", "qwen2_moe", "qwen3_moe", "nemotron_h"])
def test_bytes_in_auto_tokenizer(tmp_path: Path, model_type: str | None) -> None:
    ours = ByteTokenizer()
    ours.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"] is False  # older transformers default to True
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id) == (257, 256)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.decode([104, 256], skip_special_tokens=True) == "h"


def test_bytes_in_fast_tokenizer(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in TEXTS] == [list(t.encode()) for t in TEXTS]


def test_file_tokenizer_in_auto_tokenizer(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "some.json"))
    ours = FileTokenizer(tmp_path / "some.json")
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == ours.end_of_text_id == 2
    assert theirs("b a b")["input_ids"] == ours.encode("b a b").tolist() == [1, 0, 1]
