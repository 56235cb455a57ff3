"""KVCache: shapes, handing out pages, slots."""

from __future__ import annotations

import pytest
import torch

from compare import assert_equal
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.model import ModelConfig
from tiny_model import config_fields


def make_cache(num_pages: int, page_size: int) -> KVCache:
    return KVCache(
        ModelConfig.from_dict(config_fields()), num_pages, page_size, "cpu", torch.bfloat16
    )


def test_cache_hands_out_pages() -> None:
    cache = make_cache(10, 4)
    assert cache.k.shape == cache.v.shape == (3, 10, 4, 2, 16) and cache.k.dtype == torch.bfloat16
    assert cache.num_bytes == 2 * 3 * 10 * 4 * 2 * 16 * 2
    assert cache.k_layers[1].data_ptr() == cache.k[1].data_ptr() and len(cache.v_layers) == 3
    first = cache.allocate(2, [5, 12])
    assert_equal(first, torch.tensor([[0, 1, -1], [2, 3, 4]], dtype=torch.int32), "page table")
    second = cache.allocate(1, 17, generator=torch.Generator().manual_seed(0))
    assert sorted(second.flatten().tolist()) == [5, 6, 7, 8, 9] and cache.num_free_pages == 0
    with pytest.raises(RuntimeError, match="need 1 pages of 4 tokens, got 0 of 10"):
        cache.allocate(1, 1)
    cache.free(first)
    assert cache.num_free_pages == 5
    with pytest.raises(ValueError, match="page_table must hold pages in use"):
        cache.free(first)
    with pytest.raises(ValueError, match="page_table must hold pages in use"):
        cache.free(torch.tensor([5, 5]))
    assert cache.num_free_pages == 5
    assert cache.allocate(0, 3).shape == (0, 0)
    assert cache.allocate(2, 0).shape == (2, 0)
    with pytest.raises(ValueError, match="one for each of 2 requests"):
        cache.allocate(2, [1])
    with pytest.raises(ValueError, match="num_pages"):
        make_cache(2**20, 2**11)
    with pytest.raises(ValueError, match="page_size >= 1"):
        make_cache(2, 0)


def test_cache_grows() -> None:
    """Pages in use keep their numbers and entries; the lowest free ones still go first."""
    cache = make_cache(3, 4)
    held = cache.allocate(1, 8)
    cache.k.copy_(torch.rand(cache.k.shape))
    cache.v.copy_(torch.rand(cache.v.shape))
    k, v = cache.k.clone(), cache.v.clone()
    cache.grow(7)
    assert cache.num_pages == 7 and cache.num_free_pages == 5 and held.tolist() == [[0, 1]]
    assert_equal(cache.k[:, :3], k, "k")
    assert_equal(cache.v[:, :3], v, "v")
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(cache.k, cache.k_layers, strict=True))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(cache.v, cache.v_layers, strict=True))
    assert cache.allocate(1, 12).tolist() == [[2, 3, 4]]
    for num_pages in (6, 2**30):
        with pytest.raises(ValueError, match=r"num_pages must lie in \[7, 2\^31"):
            cache.grow(num_pages)


def test_slots() -> None:
    cache = make_cache(8, 3)
    table = torch.tensor([[7, 2, -1], [4, 0, 5]], dtype=torch.int32)
    request = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1, 1])
    positions = torch.tensor([0, 2, 5, 3, 8, 7, 6, 9, -1], dtype=torch.int32)
    expected = torch.tensor([21, 23, 8, 0, 17, 16, -1, -1, -1], dtype=torch.int32)
    assert_equal(cache.slots(table, request, positions), expected, "slots")
    assert_equal(cache.slots(table, request.int(), positions), expected, "slots, int32 requests")
