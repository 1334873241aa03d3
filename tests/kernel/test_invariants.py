"""The recount after every step notices when the kernel's books are wrong in one place: who guards the guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_os.kernel import events as ev
from llm_os.kernel.config import Tenant
from llm_os.kernel.driver import Extent
from llm_os.kernel.process import State
from llm_os.kernel.residency import Where
from llm_os.kernel.slab import Page


def _process(core: Any) -> Any:
    return core.processes[2]


def _page(core: Any) -> Any:
    return _process(core).table.pages[-1]


def _slab(core: Any) -> Any:
    return next(iter(core.memory.slabs.values()))


def _cached(core: Any) -> Any:
    return next(page for page in core.pager.cache if not page.references)


def _listed(core: Any) -> dict[bytes, Any]:
    full: dict[bytes, Any] = core.pager.cache._full
    return full


def _lose_a_reference(core: Any) -> None:
    _page(core).references += 1


def _forget_a_cached_page(core: Any) -> None:
    del _listed(core)[_cached(core).key]


def _rename_a_cached_page(core: Any) -> None:
    _cached(core).key = b"another"


def _let_a_cached_page_never_go(core: Any) -> None:
    _cached(core).rested = -1


def _swap_two_places(core: Any) -> None:
    one, two = _process(core).table.pages[:2]
    one.number, two.number = two.number, one.number


def _map_a_page_of_nobody(core: Any) -> None:
    page = Page(_slab(core))
    page.references = 1
    page.number = 10_000
    _process(core).table.pages.append(page)


def _place_a_page_of_nobody(core: Any) -> None:
    slab = _slab(core)
    page = Page(slab)
    page.references = 1
    slab.place(page)


def _free_a_place_twice(core: Any) -> None:
    numbers = next(iter(_slab(core)._free.values()))
    numbers.append(numbers[0])


def _free_a_place_in_use(core: Any) -> None:
    slab = _slab(core)
    frame, numbers = next(iter(slab._free.items()))
    numbers[0] = next(number for number in slab.pages if number // slab.slots == frame)


def _lose_a_free_place(core: Any) -> None:
    slab = _slab(core)
    next(iter(slab._free.values())).pop()
    slab._free_slots -= 1


def _count_a_held_page_more(core: Any) -> None:
    held = _slab(core).held
    held[next(iter(held))] += 1


def _count_a_used_page_more(core: Any) -> None:
    used = _slab(core).used
    used[next(iter(used))] += 1


def _miscount(name: str) -> Callable[[Any], None]:
    def damage(core: Any) -> None:
        setattr(_slab(core), name, getattr(_slab(core), name) + 1)

    damage.__name__ = f"_miscount{name}"
    return damage


def _lose_a_free_frame(core: Any) -> None:
    core.memory.free_frames -= 1


def _overlap_extents(core: Any) -> None:
    owned = core.memory._extents
    (name, extents), *_ = owned.items()
    owned[name] = (*extents, Extent(extents[0].frame, 1))


def _give_weights_a_frame_of_pages(core: Any) -> None:
    owned = core.memory._extents
    (name, extents), *_ = owned.items()
    owned[name] = (*extents, Extent(next(iter(_slab(core).used)), 1))


def _clear_a_frame_for_nobody(core: Any) -> None:
    core.memory._clearing[next(iter(_slab(core).used))] = "nobody"


def _lose_a_slot(core: Any) -> None:
    _cached(core).slot = 7


def _miscount_swap(core: Any) -> None:
    core.pager.swapper.swap.used["host"] += 1


def _be_somewhere_else(core: Any) -> None:
    next(iter(core.residency.models.values())).where = Where.ON_DISK


def _end_without_leaving(core: Any) -> None:
    _process(core).state = State.ENDED


def _feed_all(core: Any) -> None:
    _process(core).computed = len(_process(core).tokens)


def _write_a_shared_page(core: Any) -> None:
    _page(core).cached = True


def _use_more_than_was_reserved(core: Any) -> None:
    _process(core).charged = _process(core).reservation.tokens + 1


def _reserve_beyond_the_quota(core: Any) -> None:
    _process(core).reservation.account.reserved_tokens += 10**6


DAMAGES = [
    _lose_a_reference,
    _forget_a_cached_page,
    _rename_a_cached_page,
    _let_a_cached_page_never_go,
    _swap_two_places,
    _map_a_page_of_nobody,
    _place_a_page_of_nobody,
    _free_a_place_twice,
    _free_a_place_in_use,
    _lose_a_free_place,
    _count_a_held_page_more,
    _count_a_used_page_more,
    *map(_miscount, ("_closed_frames", "_free_slots", "_held_open", "_frames_held")),
    _lose_a_free_frame,
    _overlap_extents,
    _give_weights_a_frame_of_pages,
    _clear_a_frame_for_nobody,
    _lose_a_slot,
    _miscount_swap,
    _be_somewhere_else,
    _end_without_leaving,
    _feed_all,
    _write_a_shared_page,
    _use_more_than_was_reserved,
    _reserve_beyond_the_quota,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.lstrip("_"))
def test_the_recount_after_a_step_notices(machine: Any, damage: Callable[[Any], None]) -> None:
    m = machine(page_tokens=4, swap_host="1MiB", tenants={"": Tenant(max_tokens=1000)})
    model = "sim:a?kv_bytes_per_token=4096"  # four pages in a frame
    m.submit(1, "somebody who has gone", model)
    m.settle()
    m.submit(2, "x" * 21, model)
    m.until(ev.Run)
    m.core.check()
    damage(m.core)
    with pytest.raises(AssertionError):
        m.core.check()
