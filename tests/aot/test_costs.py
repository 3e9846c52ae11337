# ruff: noqa: E501 (lines are as XLA writes them)
"""What a program does, counted in its text: against arithmetic, XLA's analysis and loops undone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ais_jax.aot import costs, hlo

# As libtpu writes it: tiles and memory spaces in the layouts, comments in the tuples.
TEXT = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[64,128]{1,0})->bf16[64,128]{1,0}}

%fused_slice (param_0: s8[3,128,128], param_1: s32[]) -> s8[128,128] {
  %param_0 = s8[3,128,128]{2,1,0:T(8,128)(4,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = s8[1,128,128]{2,1,0:T(8,128)(4,1)} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,128,128}
  ROOT %flat = s8[128,128]{1,0:T(8,128)(4,1)} bitcast(%slice)
}

%fused_product (param_0.1: s8[64,128], param_1.1: s8[128,128]) -> s32[64,128] {
  %param_0.1 = s8[64,128]{1,0} parameter(0)
  %param_1.1 = s8[128,128]{1,0} parameter(1)
  ROOT %product = s32[64,128]{1,0} convolution(%param_0.1, %param_1.1), dim_labels=bf_io->bf
}

%body (state: (s32[], s8[64,128], /*index=2*/s8[3,128,128])) -> (s32[], s8[64,128], s8[3,128,128]) {
  %state = (s32[]{:T(128)}, s8[64,128]{1,0:T(8,128)(4,1)}, /*index=2*/s8[3,128,128]{2,1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = s8[64,128]{1,0:T(8,128)(4,1)} get-tuple-element(%state), index=1
  %ws = s8[3,128,128]{2,1,0:T(8,128)(4,1)} get-tuple-element(%state), index=2
  %w = s8[128,128]{1,0:T(8,128)(4,1)S(1)} fusion(%ws, %turn), kind=kLoop, calls=%fused_slice
  %y = s32[64,128]{1,0:T(8,128)} fusion(%x, %w), kind=kOutput, calls=%fused_product
  %sum = s32[64,128]{1,0:T(8,128)} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
  %narrow = s8[64,128]{1,0:T(8,128)(4,1)} convert(%sum)
  ROOT %out = (s32[]{:T(128)}, s8[64,128]{1,0:T(8,128)(4,1)}, s8[3,128,128]{2,1,0}) tuple(%turn, %narrow, %ws)
}

%condition (state.1: (s32[], s8[64,128], s8[3,128,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, s8[64,128]{1,0}, s8[3,128,128]{2,1,0}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %most = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %most), direction=LT
}

ENTRY %main (start: (s32[], s8[64,128], s8[3,128,128])) -> s8[64,128] {
  %start = (s32[]{:T(128)}, s8[64,128]{1,0}, s8[3,128,128]{2,1,0}) parameter(0)
  %loop = (s32[]{:T(128)}, s8[64,128]{1,0}, s8[3,128,128]{2,1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = s8[64,128]{1,0} get-tuple-element(%loop), index=1
}
"""
SMALL, LAYER, WIDE = 64 * 128, 128 * 128, 4 * 64 * 128  # bytes of x, of one kernel, of a product


def test_a_loop_with_fusions_and_messages():
    found = costs.count(TEXT, devices=8)
    assert found.operations == {"int8": 3 * 2 * 64 * 128 * 128}
    assert found.collectives == {"all-reduce": 3}
    assert found.received == {"all-reduce": 3 * WIDE * 2 * 3 / 4}
    # A slice is read, not all kernels; what lies in VMEM is neither written nor read.
    product, message, narrowing = SMALL + WIDE, 2 * WIDE, WIDE + SMALL
    compared = 1  # the loop's condition writes a byte and reads two numbers, four times or three
    small = found.moved - 3 * (LAYER + product + message + narrowing)
    assert compared <= small < 100


def test_what_xla_notes_comes_first():
    noted = TEXT.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}\n'
    )
    assert costs.count(noted, 8).collectives == {"all-reduce": 7}


def test_a_counter_that_rises_by_two():
    turned = TEXT.replace("constant(3)", "constant(8)").replace(
        "tuple(%turn, %narrow, %ws)", "tuple(%next, %narrow, %ws)"
    )
    step = """  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%turn, %two)
  ROOT %out"""
    assert costs.count(turned.replace("  ROOT %out", step), 8).collectives == {"all-reduce": 4}


def test_a_program_needs_an_entry():
    with pytest.raises(ValueError, match="ENTRY"):
        costs.count("nothing", 1)


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", 8),
        ("replica_groups={}", 16),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_1'}, dimensions={0}", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=4] {'data','fsdp':(2)4}", 8),
    ],
)
@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all-gather", lambda n: n - 1),
        ("all-gather-start", lambda n: n - 1),
        ("reduce-scatter", lambda n: (n - 1) / n),
        ("all-to-all", lambda n: (n - 1) / n),
        ("collective-permute", lambda n: 1),
    ],
)
def test_messages(attributes, group, kind, share):
    text = f"""
ENTRY %main (x: f32[100]) -> f32[100] {{
  %x = f32[100]{{0}} parameter(0)
  ROOT %y = f32[100]{{0}} {kind}(%x), {attributes}
}}
"""
    found = costs.count(text, 16)
    assert found.received == {kind.removesuffix("-start"): pytest.approx(400 * share(group))}


def test_a_batch_of_products_as_a_tpu_writes_it():
    """[5] x [7, 11] @ [11, 13], the batch as a spatial axis with a window that is dilated."""
    text = """
ENTRY %main (x: bf16[5,7,11], y: bf16[5,11,13]) -> bf16[5,7,13] {
  %x = bf16[5,7,11]{2,1,0} parameter(0)
  %y = bf16[5,11,13]{2,1,0} parameter(1)
  ROOT %z = bf16[5,7,13]{2,1,0} convolution(%x, %y), window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf
}
"""
    assert costs.count(text, 1).operations == {"bf16": 2 * 5 * 7 * 11 * 13}


def test_a_convolution_meets_its_input_alone():
    """A width-3 window over 10 numbers with a pad of 1 at both ends: 28 pairs."""
    text = """
ENTRY %main (x: f32[2,10,3], y: f32[3,3,4]) -> f32[2,10,4] {
  %x = f32[2,10,3]{2,1,0} parameter(0)
  %y = f32[3,3,4]{2,1,0} parameter(1)
  ROOT %z = f32[2,10,4]{2,1,0} convolution(%x, %y), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    pairs = sum(0 <= i + k - 1 < 10 for i in range(10) for k in range(3))
    assert costs.count(text, 1).operations == {"f32": 2 * 2 * 3 * 4 * pairs}


SPLASH = """HloModule m

ENTRY %main (q: bf16[2,16,4096,128], k: bf16[2,4,4096,128], s: s32[2,4096,128]) -> bf16[2,16,4096,128] {
  %q = bf16[2,16,4096,128]{3,2,1,0} parameter(0)
  %k = bf16[2,4,4096,128]{3,2,1,0} parameter(1)
  %s = s32[2,4096,128]{2,1,0} parameter(2)
  %b = s8[1,8,8]{2,1,0} constant({...})
  %iota.3.q_sequence_ref = s32[4096,128]{1,0} iota(), iota_dimension=0
  ROOT %splash_mha_KIND.1 = bf16[2,16,4096,128]{3,2,1,0} custom-call(%b, %q, %k, %k, %sPLACES), custom_call_target="tpu_custom_call"
}
"""


@pytest.mark.parametrize(
    ("kind", "places", "products"),
    [
        ("fwd_segmented_residuals", ", %iota.3.q_sequence_ref", 1.0),  # causal: half of two
        ("fwd_segmented_residuals", "", 2.0),
        ("dq_segmented_no_residuals", ", %iota.3.q_sequence_ref", 1.5),
        ("dkv_segmented_no_residuals", ", %iota.3.q_sequence_ref", 2.0),
        ("other", "", 0.0),
    ],
)
def test_splash_attention_multiplies_what_is_seen(kind, places, products):
    text = SPLASH.replace("KIND", kind).replace("PLACES", places)
    found = costs.count(text, 1).operations
    assert sum(found.values()) == products * 2 * (2 * 16) * 4096**2 * 128
    assert set(found) <= {"bf16"}


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%y = f32[100]{0} copy(%x)", 800),
        ("%y = f32[100]{0:S(1)} copy(%x)", 400),
        ("%y = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%x)", 400),
        ("%y = (f32[100]{0}, f32[400]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]", 2000),
        ("%y = f32[7]{0} dynamic-slice(%x, %i), dynamic_slice_sizes={7}", 56),
        (
            "%y = ((f32[100]{0}), f32[7]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:7]}",
            28,
        ),
        ("%y = f32[100]{0} dynamic-update-slice(%x, %part, %i)", 56),
        ("%y = f32[100]{0} bitcast(%x)", 0),
    ],
)
def test_bytes_of_one_instruction(line, moved):
    text = f"""
ENTRY %main (x: f32[100], part: f32[7], i: s32[]) -> f32[100] {{
  %x = f32[100]{{0}} parameter(0)
  %part = f32[7]{{0}} parameter(1)
  %i = s32[] parameter(2)
  ROOT {line}
}}
"""
    assert costs.count(text, 4).moved == moved


def test_a_cache_is_written_where_it_changes():
    text = """
%fused (p0: bf16[64,100], p1: bf16[64,1], p2: s32[]) -> bf16[64,100] {
  %p0 = bf16[64,100]{1,0} parameter(0)
  %p1 = bf16[64,1]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %put = bf16[64,100]{1,0} dynamic-update-slice(%p0, %p1, %zero, %p2)
}

ENTRY %main (x: bf16[64,100], new: bf16[64,1], i: s32[]) -> bf16[64,100] {
  %x = bf16[64,100]{1,0} parameter(0)
  %new = bf16[64,1]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = bf16[64,100]{1,0} fusion(%x, %new, %i), kind=kLoop, calls=%fused
}
"""
    assert costs.count(text, 1).moved == 2 * 128 + 4


def test_a_slice_of_what_is_converted_on_the_way():
    """A fusion within a fusion gives a kernel other tiles, and one layer is taken of that."""
    text = """
%retiled (p0.1: s8[36,64,128]) -> s8[36,64,128] {
  %p0.1 = s8[36,64,128]{2,1,0:T(32,128)} parameter(0)
  ROOT %copy = s8[36,64,128]{2,1,0:T(8,128)} copy(%p0.1)
}

%fused (p0: s8[36,64,128], p1: s32[]) -> bf16[64,128] {
  %p0 = s8[36,64,128]{2,1,0:T(32,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %inner = s8[36,64,128]{2,1,0:T(8,128)} fusion(%p0), kind=kLoop, calls=%retiled
  %wide = bf16[36,64,128]{2,1,0} convert(%inner)
  %layer = bf16[1,64,128]{2,1,0} dynamic-slice(%wide, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %flat = bf16[64,128]{1,0} bitcast(%layer)
}

ENTRY %main (x: s8[36,64,128], i: s32[]) -> bf16[64,128] {
  %x = s8[36,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %y = bf16[64,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""
    assert costs.count(text, 1).moved == 64 * 128 + 4 + 2 * 64 * 128
    used = text.replace(
        "ROOT %flat = bf16[64,128]{1,0} bitcast(%layer)",
        "ROOT %all = bf16[64,128]{1,0} reduce(%wide, %layer)",
    )
    assert costs.count(used, 1).moved == 36 * 64 * 128 + 4 + 2 * 64 * 128


LAYERS, ROWS, SIZE = 6, 16, 32


def stack(x, ws, unroll):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws, unroll=unroll)[0]


def compiled(function, *shapes, **options):
    return jax.jit(function, **options).lower(*shapes).compile()


def test_a_scan_costs_what_its_layers_cost():
    shapes = (
        jax.ShapeDtypeStruct((ROWS, SIZE), jnp.float32),
        jax.ShapeDtypeStruct((LAYERS, SIZE, SIZE), jnp.float32),
    )
    scanned = compiled(lambda x, ws: stack(x, ws, 1), *shapes)
    unrolled = compiled(lambda x, ws: stack(x, ws, LAYERS), *shapes)
    expected = {"f32": 2.0 * LAYERS * ROWS * SIZE * SIZE}
    assert costs.count(scanned.as_text(), 1).operations == expected
    assert costs.count(unrolled.as_text(), 1).operations == expected
    # XLA's own analysis has the products and what is done to single numbers, of one body.
    extra = unrolled.cost_analysis()["flops"] - expected["f32"]
    assert 0 <= extra < 0.1 * expected["f32"]
    assert scanned.cost_analysis()["flops"] < 1.2 * expected["f32"] / LAYERS


def test_a_loop_that_ends_when_it_ends_turns_as_often_as_said():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ x, x)

    text = compiled(halve, jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)).as_text()
    for turns in (1, 9):
        assert costs.count(text, 1, turns).operations == {"f32": turns * 2.0 * SIZE**3}


def test_a_split_contraction_is_summed_over_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    left = NamedSharding(mesh, PartitionSpec(None, "x"))
    right = NamedSharding(mesh, PartitionSpec("x", None))
    program = compiled(
        jnp.matmul,
        jax.ShapeDtypeStruct((ROWS, 64), jnp.float32, sharding=left),
        jax.ShapeDtypeStruct((64, SIZE), jnp.float32, sharding=right),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    found = costs.count(program.as_text(), 8)
    assert found.operations == {"f32": 2.0 * ROWS * SIZE * 8}
    assert found.collectives == {"all-reduce": 1}
    assert found.received["all-reduce"] == pytest.approx(4 * ROWS * SIZE * 2 * 7 / 8)


def test_shapes():
    (array,) = hlo.shapes_of("f8e4m3fn[3,<=5]{1,0:T(8,128)(4,1)S(1)}")
    assert (array.dims, array.size, array.far) == ((3, 5), 15, 0)
    pair = hlo.shapes_of("(s4[10]{0}, /*index=1*/pred[], token[])")
    assert np.allclose([shape.size for shape in pair], [5, 1, 0])
