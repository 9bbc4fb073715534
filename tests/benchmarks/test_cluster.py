"""What the tables of docs/scaling.md say, by the formulas of benchmarks/cluster.py."""

import re
from pathlib import Path

import pytest

from benchmarks.cluster import DDP, FSDP2, MODELS, exchange, keys_and_values, learning, main, sft_step, sharing_for

ROOT = Path(__file__).parents[2]
SMALL, MIDDLE, _ = MODELS


def test_the_page_has_the_tables_that_the_command_prints(capsys):
    main()
    tables = re.findall(r"^\|.*?(?=\n\n)", capsys.readouterr().out, re.M | re.S)
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert len(tables) == 2 and all(table in page for table in tables)


def test_a_model_is_copied_where_it_leaves_room_and_else_cut():
    assert sharing_for(SMALL) is DDP and sharing_for(MIDDLE) is FSDP2


def test_a_ring_over_two_hands_half_of_it_to_the_other():
    assert exchange(900e9, 2) == pytest.approx(1.0)  # 450 GB at 450 GB/s
    assert exchange(400e9, 64) == pytest.approx(63 / 64)  # 8 adapters of 50 GB/s


def test_figures_worked_out_by_hand():
    assert keys_and_values(MIDDLE) == 2 * 2 * 32 * 8 * 128  # bytes: keys and values in bfloat16, 8 heads of 128
    products, network = sft_step(MIDDLE, 64)
    assert products == pytest.approx(6 * 8.03e9 * 2**20 / 64 / (989e12 * 0.4))
    assert network == pytest.approx(8 * 8.03e9 * 63 / 64 / 400e9)  # one micro-batch: gathered twice, scattered once
    # 16 bytes a weight over 64, inputs of 32 blocks, and two units in bfloat16 with the gradient of a third.
    inputs, units = 4 * 32 * 4096 * 16_384, 8 * 2 * 128_256 * 4096
    assert learning(MIDDLE, 64) == pytest.approx(16 * 8.03e9 / 64 + inputs + units)
