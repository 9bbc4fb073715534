import pytest

from lit_rlhf.demo import rows


@pytest.fixture(scope="module")
def demonstrations() -> list[dict]:
    return rows("sft")
