"""Meta-gradients equal eager unrolling: models × optimizers × T × every kind of meta-parameter."""

import pytest

from tests.gradients.programs import assert_equals_eager, compiled
from tests.oracles import cases

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("model", cases.MODELS)
def test_meta_gradients_equal_eager_unrolling(model: str, optimizer: str, steps: int) -> None:
    case = cases.build(model, optimizer, steps)
    expected = case.unroll()
    result = compiled(case)(case.train, case.val)
    assert_equals_eager(result, expected, case.meta)
