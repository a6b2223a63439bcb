"""Text encoders: a plain model's mean, sentence-transformers' own pooling, instructions, copies, threads, refusals."""

from __future__ import annotations

import builtins
import copy
import gc
import json
import pickle
import re
import sys
import threading
import types

import pytest
import torch
from transformers import BertConfig, BertModel

from loraflow import encoders
from loraflow.encoders import TextEncoder
from loraflow.errors import LoraflowError, MethodError
from tests.tiny import VOCAB, number_tokenizer

CPU = torch.device("cpu")
TEXT = "5 6 7 9"


def save_bert(path, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(path)
    number_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small BERT with a tokenizer, on disk."""
    return save_bert(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sentence(tmp_path_factory):
    """The same with what sentence-transformers writes beside it: the first token's state, then length 1."""
    path = tmp_path_factory.mktemp("sentence")
    save_bert(path)
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": part, "type": f"sentence_transformers.models.{kind}"}
        for i, (part, kind) in enumerate(parts.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    return str(path)


@torch.no_grad()
def states(path, text):
    model = BertModel.from_pretrained(path).eval()
    return model(**number_tokenizer()(text, return_tensors="pt")).last_hidden_state[0]


def test_a_plain_models_vector_is_the_mean_of_its_last_states(plain):
    encoder = TextEncoder(plain)
    assert encoder.features == 16
    torch.testing.assert_close(encoder.embed(TEXT, CPU), states(plain, TEXT).mean(dim=0))
    instructed = TextEncoder(plain, "3 4 ")
    torch.testing.assert_close(instructed.embed(TEXT, CPU), states(plain, "3 4 " + TEXT).mean(dim=0))


def test_a_text_that_is_too_long_is_cut_and_one_without_tokens_refused(plain):
    encoder = TextEncoder(plain)
    positions = BertModel.from_pretrained(plain).config.max_position_embeddings
    cut = " ".join(["5"] * (positions - 2))
    torch.testing.assert_close(encoder.embed(cut + " 7" * 90, CPU), encoder.embed(cut, CPU))
    with pytest.raises(MethodError, match=r"makes no token of ''\. Give a text, or another encoder"):
        encoder.embed("", CPU)


def test_a_model_that_says_how_is_run_by_sentence_transformers(sentence):
    pytest.importorskip("sentence_transformers", reason="needs loraflow[retrieval]")
    encoder = TextEncoder(sentence)
    assert encoder.features == 16
    expected = states(sentence, TEXT)[0]
    torch.testing.assert_close(encoder.embed(TEXT, CPU), expected / expected.norm())
    expected = states(sentence, "3 4 " + TEXT)[0]
    torch.testing.assert_close(TextEncoder(sentence, "3 4 ").embed(TEXT, CPU), expected / expected.norm())
    vector = encoder.embed(TEXT, CPU)
    # A gradient may come near.
    (vector * torch.ones(16, requires_grad=True)).sum().backward()


class Fake:
    """What the library has of sentence-transformers' model, noting how it is asked."""

    def __init__(self, path, device):
        self.path, self.device, self.asked = path, device, []

    def get_embedding_dimension(self):
        return 3

    def encode(self, texts, prompt, **options):
        self.asked.append((texts, prompt, options["device"]))
        return torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float16)


def test_how_sentence_transformers_is_asked(sentence, monkeypatch):
    made = []

    def make(path, device):
        made.append(Fake(path, device))
        return made[-1]

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=make))
    monkeypatch.setattr(encoders, "_opened", {})
    encoder = TextEncoder(sentence, "Represent: ")
    assert encoder.features == 3
    assert encoder.embed("a", CPU).dtype == torch.float32
    # An empty instruction is given too: the model's own default does not take its place.
    TextEncoder(sentence).embed("b", CPU)
    (model,) = made
    assert (model.path, model.device) == (sentence, "cpu")
    assert model.asked == [(["a"], "Represent: ", "cpu"), (["b"], "", "cpu")]


def test_a_missing_extra_is_named(sentence, monkeypatch):
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "sentence_transformers":
            raise ImportError(f"No module named {name!r}")
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(encoders, "_opened", {})
    with pytest.raises(LoraflowError, match=re.escape("pip install 'loraflow[retrieval]'")) as error:
        TextEncoder(sentence)
    assert f"`encoder` (={sentence!r}) is a model of sentence-transformers" in str(error.value)


def test_broken_files_are_named(sentence, monkeypatch):
    class Broken:
        def __init__(self, path, device):
            raise RuntimeError("no weights here")

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Broken))
    monkeypatch.setattr(encoders, "_opened", {})
    with pytest.raises(MethodError, match=r"is no model that sentence-transformers can load: no weights here"):
        TextEncoder(sentence)


@pytest.mark.parametrize("name", ["no such name at all!", ""])
def test_a_model_that_is_none_is_named(name):
    with pytest.raises(MethodError, match=rf"`encoder` \(={re.escape(repr(name))}\) is no model"):
        TextEncoder(name)


def test_a_hub_that_cannot_be_reached_is_no_answer(monkeypatch):
    def unreachable(name, file, **options):
        raise OSError(f"We couldn't connect to look for {file}.")

    monkeypatch.setattr(encoders, "cached_file", unreachable)
    with pytest.raises(MethodError, match=r"is no model that transformers can load: We couldn't .* modules\.json\. G"):
        TextEncoder("user/model")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(
        MethodError,
        match=r"is no model that transformers can load: (.|\n)*\. Give the Hub id or the directory of one\.",
    ):
        TextEncoder(str(tmp_path))


def test_encoders_of_one_model_share_it_and_copies_do(plain):
    first, second = TextEncoder(plain), TextEncoder(plain, "3 ")
    model = first._model
    assert second._model is model
    for again in (copy.deepcopy(first), pickle.loads(pickle.dumps(second))):
        assert again._model is model
    assert pickle.loads(pickle.dumps(second)).instruction == "3 "
    assert len(pickle.dumps(first)) < 1000
    del first, second, again, model
    gc.collect()
    assert plain not in encoders._opened


def test_threads_may_share_one(plain):
    encoder, found = TextEncoder(plain), {}
    texts = [f"{a} {b}" for a in range(4, 8) for b in range(4, 8)]

    def embed(mine):
        for text in mine:
            found[text] = encoder.embed(text, CPU)

    threads = [threading.Thread(target=embed, args=(texts[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[text], encoder.embed(text, CPU)) for text in texts)
