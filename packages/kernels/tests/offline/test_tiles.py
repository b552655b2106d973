"""Tiles in Triton's own form of kernels."""

from fivefold.kernels.offline.tiles import bytes_of

# As Triton prints it, shortened: a loop over whole blocks, and what it leaves.
BLOCKS = """
module {
  tt.func public @k(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("{{"(#l))) attributes {a} {
    %size = tt.load %sizes {tt.divisibility = dense<16> : tensor<1xi32>} : !tt.ptr<i64> loc(#loc2)
    %weight = tt.load %p : tensor<4096x!tt.ptr<bf16>> loc(#loc2)
    %rows = tt.load %q : tensor<16x!tt.ptr<f32>> loc(#loc2)
    scf.if %active {
      %sum = scf.for %i = %a to %b step %c iter_args(%s = %zero) -> (f32)  : i64 {
        %g = tt.load %pg, %m : tensor<1x1024x!tt.ptr<f32>> loc(#loc3)
        %r = "tt.reduce"(%g) <{axis = 1 : i32}> ({
        ^bb0(%u: f32 loc("u"), %v: f32 loc("v")):
          tt.reduce.return %u : f32 loc(#loc4)
        }) : (tensor<1x1024xf32>) -> tensor<1xf32> loc(#loc4)
        tt.store %po, %g : tensor<1x1024x!tt.ptr<f32>> loc(#loc3)
        scf.yield %r : f32 loc(#loc5)
      } {tt.num_stages = 2 : i32} loc(#loc5)
      scf.if %rest {
        %g = tt.load %pg, %m : tensor<1x1024x!tt.ptr<f32>> loc(#loc6)
        tt.store %po, %g, %m : tensor<1x1024x!tt.ptr<f32>> loc(#loc6)
      } else {
        tt.store %po, %z, %m : tensor<8192x!tt.ptr<f32>> loc(#loc6)
      } loc(#loc7)
    } loc(#loc7)
    tt.store %last, %z : tensor<2048x!tt.ptr<f8E4M3FN>> loc(#loc7)
    tt.return loc(#loc7)
  } loc(#loc)
} loc(#loc)
"""
BRANCHES = """
  tt.func public @k(%x: !tt.ptr<f32>) {
    scf.if %first {
      tt.store %p, %z : tensor<1024x!tt.ptr<f32>>
    } else {
      tt.store %p, %z : tensor<512x!tt.ptr<f32, 1>>
    }
  }
"""
WHILE = """
  tt.func public @k(%x: !tt.ptr<f32>) {
    scf.if %first {
      %0 = scf.while (%i = %a) : (i32) -> i32 {
        scf.condition(%c) %i : i32
      } do {
      ^bb0(%i: i32):
        tt.store %p, %z : tensor<1024x!tt.ptr<f32>>
      }
      tt.store %p, %z : tensor<2048x!tt.ptr<f32>>
    }
  }
"""


def test_a_branch_after_the_loop_does_not_count() -> None:
    assert bytes_of(BLOCKS, "load", 128) == 64 + 32
    assert bytes_of(BLOCKS, "store", 128) == 32 + 16


def test_tiles_of_less_than_16_bytes_a_thread_do_not_count() -> None:
    assert bytes_of(BLOCKS, "load", 512) == 16
    assert bytes_of(BLOCKS, "load", 1024) == 0


def test_branches_count_where_there_is_nothing_else() -> None:
    assert bytes_of(BRANCHES, "store", 64) == 64 + 32
    assert bytes_of(BRANCHES, "load", 64) == 0


def test_loops_of_unknown_length() -> None:
    assert bytes_of(WHILE, "store", 64) == 64
