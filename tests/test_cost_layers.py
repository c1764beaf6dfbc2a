"""Every parameter that takes part in a product is counted, as closed formulas and PyTorch's own counter say."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from rarefy import act, cost
from rarefy._names import layer_name
from rarefy.cost import Cost
from tests.apart import apart

# These networks are so small that attention's products are a large part.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the cost of"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

E = 16


def dense(counted: Cost) -> dict[str, int]:
    return {layer.name: layer.dense for layer in counted.layers}


def torch_counts(model: nn.Module, *args: Any, **kwargs: Any) -> float:
    """All multiplications of one forward in training mode, attention's among them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(*args, **kwargs)
    return counter.get_total_flops() / 2


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(E, 8, batch_first=True, **options)  # type: ignore[call-arg]
        self.head = nn.Linear(self.rnn(torch.zeros(1, 1, E))[0].shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


class TestRecurrent:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (nn.LSTM, {}),
            (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
            (nn.LSTM, {"num_layers": 2, "proj_size": 4, "bidirectional": True, "bias": False}),
            (nn.GRU, {"num_layers": 3, "bidirectional": True}),
            (nn.RNN, {"nonlinearity": "relu"}),
            (act.LSTM, {"num_layers": 2, "bidirectional": True}),
            (act.LSTM, {"proj_size": 4, "bias": False, "mode": "hard"}),
            (act.GRU, {"num_layers": 2, "bias": False}),
        ],
    )
    @pytest.mark.parametrize("batch", [1, 3])
    def test_every_matrix_multiplies_at_every_step(
        self, kind: type[nn.RNNBase], options: Mapping[str, Any], batch: int
    ) -> None:
        model = Recurrent(kind, **options)
        counted = cost.count(model, torch.zeros(batch, 7, E))
        matrices = {name: p for name, p in model.rnn.named_parameters() if p.dim() == 2}
        assert dense(counted) == {
            **{f"rnn.{name}": 7 * p.numel() for name, p in matrices.items()},
            "head": model.head.weight.numel(),
        }
        rigl = cost.count(model, torch.zeros(batch, 7, E), "rigl").layers
        assert [layer.fixed for layer in rigl] == [7 * len(p) for p in matrices.values()] + [3]
        assert {layer.kind for layer in counted.layers} == {kind.__name__, "Linear"}
        assert counted.uncounted == {}

    @pytest.mark.parametrize(
        ("cell", "gates"),
        [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1), (act.LSTMCell, 4), (act.GRUCell, 3)],
    )
    def test_cells(self, cell: type[nn.RNNCellBase], gates: int) -> None:
        counted = cost.count(cell(E, 8), torch.zeros(2, E))  # type: ignore[call-arg, arg-type]
        assert dense(counted) == {"weight_ih": gates * 8 * E, "weight_hh": gates * 8 * 8}

    def test_time_may_come_first_and_the_batch_may_be_missing(self) -> None:
        expected = {"weight_ih_l0": 7 * 32 * E, "weight_hh_l0": 7 * 32 * 8}
        assert dense(cost.count(nn.LSTM(E, 8), torch.zeros(7, 2, E))) == expected
        assert dense(cost.count(nn.LSTM(E, 8), torch.zeros(7, E))) == expected
        assert dense(cost.count(nn.LSTM(E, 8, batch_first=True), torch.zeros(2, 7, E))) == expected

        class Transposed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = nn.LSTM(E, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.rnn(x.transpose(0, 1))[0]  # type: ignore[no-any-return]

        counted = cost.count(Transposed(), torch.zeros(2, 7, E))
        assert dense(counted) == {f"rnn.{name}": flops for name, flops in expected.items()}

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
    def test_packed_sequences_count_their_true_steps(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        class Packs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = kind(E, 8)

            def forward(self, x: Tensor, lengths: Tensor) -> PackedSequence:
                return self.rnn(pack_padded_sequence(x, lengths, batch_first=True))[0]  # type: ignore[no-any-return]

        x, lengths = torch.zeros(3, 9, E), torch.tensor([9, 4, 2])
        model = Packs()
        counted = dense(cost.count(model, (x, lengths)))
        assert counted == {f"rnn.{n}": 5 * p.numel() for n, p in model.rnn.named_parameters() if p.dim() == 2}
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        assert dense(cost.count(model.rnn, packed)) == {n.removeprefix("rnn."): flops for n, flops in counted.items()}
        # Not a whole number of steps a sample: the mean.
        assert cost.count(model, (x, torch.tensor([9, 4, 1]))).dense == round(sum(counted.values()) / 5 * 14 / 3)


class Cross(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 4, **options)

    def forward(self, query: Tensor, memory: Tensor, values: Tensor | None = None) -> Tensor:
        values = memory if values is None else values
        return self.attention(query, memory, values, need_weights=False)[0]  # type: ignore[no-any-return]


class TestAttention:
    def test_projections_have_their_own_lengths(self) -> None:
        counted = cost.count(Cross(batch_first=True), (torch.zeros(2, 3, E), torch.zeros(2, 5, E)))
        assert dense(counted) == {
            "attention.in_proj_weight": (3 + 5 + 5) * E * E,
            "attention.out_proj": 3 * E * E,
        }
        assert [layer.parameters for layer in counted.layers] == [3 * E * E, E * E]
        assert counted.uncounted == {"scaled_dot_product_attention": 2 * 3 * 5 * E}
        # The batch is the second dimension here.
        assert cost.count(Cross(), (torch.zeros(3, 2, E), torch.zeros(5, 2, E))) == counted

    def test_projections_of_other_sizes(self) -> None:
        model = Cross(kdim=8, vdim=12, batch_first=True)
        counted = cost.count(model, (torch.zeros(2, 3, E), torch.zeros(2, 5, 8), torch.zeros(2, 5, 12)))
        assert dense(counted) == {
            "attention.q_proj_weight": 3 * E * E,
            "attention.k_proj_weight": 5 * E * 8,
            "attention.v_proj_weight": 5 * E * 12,
            "attention.out_proj": 3 * E * E,
        }

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_an_encoder_as_in_training(self, batch_first: bool) -> None:
        layer = nn.TransformerEncoderLayer(E, 4, 24, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        x = torch.randn(3, 5, E) if batch_first else torch.randn(5, 3, E)
        counted = cost.count(model, x)
        one = {"self_attn.in_proj_weight": 3 * E, "self_attn.out_proj": E, "linear1": 24, "linear2": 24}
        assert dense(counted) == {f"layers.{i}.{name}": 5 * size * E for i in range(2) for name, size in one.items()}
        assert 3 * (counted.dense + sum(v or 0 for v in counted.uncounted.values())) == torch_counts(model, x)

    def test_encoder_and_decoder(self) -> None:
        model = nn.Transformer(E, 4, 2, 2, 24, dropout=0.0, batch_first=True)
        given = (torch.randn(2, 5, E), torch.randn(2, 3, E))
        counted = cost.count(model, given)
        assert 2 * (counted.dense + sum(v or 0 for v in counted.uncounted.values())) == torch_counts(model, *given)
        assert dense(counted)["decoder.layers.1.multihead_attn.in_proj_weight"] == (3 + 5 + 5) * E * E
        matrices = [layer_name(name) for name, p in model.named_parameters() if p.dim() == 2]
        assert [layer.name for layer in counted.layers] == matrices

    def test_a_padding_mask_takes_no_other_path(self) -> None:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 4, 24, batch_first=True), 1)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        x = torch.randn(2, 5, E)
        masked = cost.count(model, {"src": x, "src_key_padding_mask": mask})
        assert dense(masked) == dense(cost.count(model, x))
        assert torch.backends.mha.get_fastpath_enabled()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, E)
        self.body = nn.Linear(E, E)
        self.head = nn.Linear(E, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        assert input_ids is not None
        return self.head(self.body(self.body(self.embedding(input_ids))))  # type: ignore[no-any-return]


class Function(nn.Module):
    """One parameter, used by a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.w = nn.Parameter(torch.ones(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def halves(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([F.linear(x, half) for half in w.chunk(2)], 1)


def in_place(x: Tensor, w: Tensor) -> Tensor:
    weights = torch.zeros(8, 8)
    weights[:, 4:] = w
    return F.linear(x, weights)


class TestParameters:
    def test_tied_weights_cost_in_each_use_and_looking_up_costs_nothing(self) -> None:
        counted = cost.count(Tied(), {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": None})
        assert dense(counted) == {"embedding": 3 * 10 * E, "body": 2 * 3 * E * E}
        assert (counted.parameters, counted.other_parameters) == (10 * E + E * E, E)

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(E, E, bias=False), nn.Linear(E, E, bias=False)
                self.second.weight = self.first.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.second(self.first(x))  # type: ignore[no-any-return]

        counted = cost.count(Twice(), torch.zeros(1, E))
        assert (dense(counted), counted.parameters) == ({"first": 2 * E * E}, E * E)

    @pytest.mark.parametrize(
        ("function", "shape", "products"),
        [
            (F.linear, (6, 8), 48),
            (lambda x, w: x @ w, (8, 6), 48),
            (lambda x, w: (w @ x.t()).t(), (6, 8), 48),
            (lambda x, w: torch.addmm(torch.zeros(6), x, w), (8, 6), 48),
            (lambda x, w: torch.einsum("bi,eij->bej", x, w), (3, 8, 6), 144),
            (lambda x, w: torch.bmm(x.view(-1, 1, 8), w.expand(len(x), 8, 6)), (8, 6), 48),
            (lambda x, w: x @ w, (8,), 8),
            (lambda x, w: F.conv1d(x.unsqueeze(1), w), (4, 1, 3), 6 * 12),
            (lambda x, w: F.linear(x.bfloat16(), w.bfloat16()).float(), (6, 8), 48),
            (lambda x, w: F.linear(x, w[:2]), (6, 8), 16),
            (halves, (6, 8), 48),
            # Computed from the parameter and constants alone.
            (lambda x, w: F.linear(x, F.normalize(w)), (6, 8), 48),
            (lambda x, w: F.linear(x, w * torch.ones(6, 8)), (6, 8), 48),
            (in_place, (8, 4), 64),
        ],
    )
    @pytest.mark.parametrize("inference", [False, True])
    def test_plain_functions(
        self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], products: int, inference: bool
    ) -> None:
        model = Function(function, *shape)
        with torch.inference_mode(inference):
            counted = cost.count(model, torch.zeros(2, 8))
        assert dense(counted) == {"w": products}
        assert (counted.layers[0].kind, counted.layers[0].shape) == ("Function", shape)
        assert (counted.other_parameters, counted.uncounted) == (8, {})

    @pytest.mark.parametrize(
        ("layer", "example"),
        [
            (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), torch.zeros(2, 4, 9)),
            (nn.ConvTranspose3d(2, 3, 2), torch.zeros(1, 2, 3, 3, 3)),
            (nn.Conv2d(4, 8, 3, padding=1, groups=4, dilation=2), torch.zeros(2, 4, 9, 9)),
            (nn.Sequential(nn.Conv1d(4, 6, 3), nn.Flatten(), nn.Linear(42, 3)), torch.zeros(3, 4, 9)),
            (Function(F.linear, 6, 8), torch.zeros(2, 5, 8)),
        ],
    )
    def test_as_pytorch_counts(self, layer: nn.Module, example: Tensor) -> None:
        per_sample = torch_counts(copy.deepcopy(layer), example) / len(example)
        assert cost.count(layer, example).dense == per_sample

    def test_bilinear(self) -> None:
        assert dense(cost.count(nn.Bilinear(3, 4, 5), (torch.zeros(2, 7, 3), torch.zeros(2, 7, 4)))) == {"": 7 * 60}

    def test_computed_weights_count_the_zeros_they_have(self) -> None:
        model = nn.Sequential(
            parametrizations.weight_norm(nn.Linear(4, 4)),
            prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.75),  # type: ignore[no-untyped-call]
            parametrizations.spectral_norm(nn.Linear(4, 4)),
        )
        counted = cost.count(model, torch.zeros(3, 4))
        found = {layer.name: (layer.dense, layer.nonzeros) for layer in counted.layers}
        assert found == {
            "0.parametrizations.weight.original1": (16, 16),
            "1.weight_orig": (16, 4),
            "2.parametrizations.weight.original": (16, 16),
        }

    def test_weights_made_from_data_are_no_layer(self) -> None:
        class Dynamic(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.maker = nn.Linear(4, 16)

            def forward(self, x: Tensor) -> Tensor:
                return torch.bmm(self.maker(x).view(-1, 4, 4), x.unsqueeze(2))

        counted = cost.count(Dynamic(), torch.zeros(2, 4))
        assert (dense(counted), counted.uncounted) == ({"maker": 64}, {"bmm": 16})

    def test_a_learned_input_is_no_weight(self) -> None:
        class Queries(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.queries = nn.Parameter(torch.zeros(5, 8))
                self.project, self.read = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                queries = self.project(self.queries.expand(len(x), 5, 8))
                return self.read(queries, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

        counted = dense(cost.count(Queries(), torch.zeros(2, 3, 8)))
        assert counted == {"project": 5 * 64, "read.in_proj_weight": (5 + 3 + 3) * 64, "read.out_proj": 5 * 64}

    def test_compiled_models_and_functions_run_as_they_are_written(self) -> None:
        class Compiles(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(8, 4)
                self.compiled = torch.compile(lambda x: self.proj(x).relu(), fullgraph=True, backend="eager")

            def forward(self, x: Tensor) -> Tensor:
                return self.compiled(x)

        assert dense(cost.count(Compiles(), torch.zeros(1, 8))) == {"proj": 32}
        assert dense(cost.count(torch.compile(nn.Linear(8, 4), backend="eager"), torch.zeros(1, 8))) == {
            "_orig_mod": 32
        }  # type: ignore[arg-type]

    def test_densities_by_the_parameters_names(self) -> None:
        model = nn.Sequential(nn.LSTM(E, 8, batch_first=True))
        counted = cost.count(model, torch.zeros(1, 7, E))
        sparse = counted.with_densities({"0.weight_hh_l0": 0.25})
        assert sparse.inference == 7 * 32 * (E + 2)
        with torch.no_grad():
            model.get_parameter("0.weight_hh_l0")[:24] = 0
        assert cost.count(model, torch.zeros(1, 7, E)).inference == sparse.inference


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("conv1.weight", "conv1"),
        ("weight", ""),
        ("layers.0.self_attn.in_proj_weight", "layers.0.self_attn.in_proj_weight"),
        ("layers.0.self_attn.out_proj.weight", "layers.0.self_attn.out_proj"),
        ("rnn.weight_ih_l0", "rnn.weight_ih_l0"),
        ("weight.weight", "weight"),
    ],
)
def test_layer_names(parameter: str, layer: str) -> None:
    assert layer_name(parameter) == layer


@torch.library.custom_op("rarefy_tests::multiply", mutates_args=())
def multiply(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


class TestWhatIsNotCounted:
    def test_it_is_named(self) -> None:
        counted = cost.count(Cross(batch_first=True), (torch.zeros(1, 3, E), torch.zeros(1, 5, E)))
        assert counted.table().splitlines()[-1] == "not counted: scaled_dot_product_attention, multiplications: 480"
        assert json.loads(json.dumps(counted.to_dict()))["uncounted"] == {"scaled_dot_product_attention": 480}
        assert counted.with_densities({"attention.out_proj": 0.5}).uncounted == counted.uncounted

    def test_a_warning_where_it_is_much(self) -> None:
        def share(length: int) -> list[str]:
            model = nn.TransformerEncoderLayer(E, 4, 64, batch_first=True)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                cost.count(model, torch.zeros(1, length, E))
            return [str(warning.message) for warning in told]

        # Attention is 2 n^2 E of n (4 E + 2 64) E + 2 n^2 E multiplications.
        assert share(5) == []
        (message,) = share(64)
        assert "TransformerEncoderLayer leaves out 40% of its multiplications (scaled_dot_product_attention)" in message

    @pytest.mark.filterwarnings("error")
    def test_operators_that_do_not_tell(self) -> None:
        class Custom(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj, self.other = nn.Linear(4, 4), nn.Parameter(torch.zeros(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return multiply(self.proj(x), self.other)

        with pytest.warns(UserWarning, match="Custom leaves out what rarefy_tests::multiply multiplies"):
            counted = cost.count(Custom(), torch.zeros(2, 4))
        assert (dense(counted), counted.uncounted) == ({"proj": 16}, {"rarefy_tests::multiply": None})
        assert "not counted: rarefy_tests::multiply, multiplications: unknown" in counted.table()


class TestExamples:
    def test_none_and_nested_arguments(self) -> None:
        ids = torch.zeros(2, 3, dtype=torch.long)
        assert cost.count(Tied(), (ids, None)).dense == cost.count(Tied(), ids).dense
        state = (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
        model = nn.LSTM(E, 8, batch_first=True)
        assert cost.count(model, (torch.zeros(2, 7, E), state)) == cost.count(model, torch.zeros(2, 7, E))

    def test_a_number_before_the_samples(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(4, 4)

            def forward(self, scale: Tensor, x: Tensor) -> Tensor:
                return scale * self.proj(x)  # type: ignore[no-any-return]

        assert cost.count(Scaled(), (torch.tensor(2.0), torch.zeros(3, 4))).dense == 16

    @pytest.mark.parametrize("shape", [(1, 3, 32, 32), torch.Size([1, 3, 32, 32]), [1, 3, 32, 32]])
    def test_a_shape(self, shape: Any) -> None:
        message = r"must hold a tensor, got \(1, 3, 32, 32\); where that is a shape, give torch.zeros\(1, 3, 32, 32\)"
        with pytest.raises(ValueError, match=message):
            cost.count(nn.Conv2d(3, 4, 3), shape)

    def test_lazy_layers(self) -> None:
        with pytest.raises(
            ValueError, match=r"'1.weight' is of a lazy layer that has no shape yet; call the model once"
        ):
            cost.count(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), torch.zeros(1, 4))


def _sharded() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    encoder = nn.TransformerEncoderLayer(E, 4, 24, batch_first=True)
    model = nn.Sequential(nn.Linear(8, E), encoder, nn.LSTM(E, 8, batch_first=True))
    with torch.no_grad():
        encoder.linear1.weight[:6] = 0
    x = torch.zeros(2, 5, 8)
    plain = cost.count(model, x)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert cost.count(model, x) == plain


def test_sharded_parameters_are_counted_whole(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    apart(_sharded, tmp_path)
