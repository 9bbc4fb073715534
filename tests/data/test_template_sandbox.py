import pytest

from lit_rlhf import UserError
from lit_rlhf.data.chat import Renderer
from tests.tiny_tokenizers import byte_tokenizer

USER = {"role": "user", "content": "hi"}


def render(template):
    return Renderer(byte_tokenizer(template))([USER])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10 ** (10 ** 10) }}",
        "{% set x = (messages|length + 9) ** (10 ** 10) %}",
        "{% set x = ('f' * 2000)|int(base=16) %}{% set y = x * x %}",
        "{% set x = ('f' * 2000)|int(base=16) %}{% set y = x // 3 %}",
        "{% set x = ('f' * 2000)|int(base=16) %}{% set y = x % 3 %}",
        "{{ 1.5|round(10 ** 9, 'floor') }}",
        "{{ 5|round(-10 ** 9) }}",
    ],
)
def test_numbers_of_which_one_operation_may_take_hours_are_refused(template):
    with pytest.raises(UserError, match=r"refuses a conversation of the roles \['user'\]: .*(bits, more than|digits)"):
        render(template)


def test_numbers_as_templates_have_them_are_what_they_are():
    template = "{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 2 }} {{ 3 / 2 }} {{ 2 ** -1 }} {{ 'ab' * 2 }} {{ '%s!' % 'x' }}"
    assert render(template) == "1024 3 1 1.5 0.5 abab x!"
    assert render("{{ 1.256|round(2) }} {{ 1.256|round(1, 'floor') }} {{ 2.5|round|int }}") == "1.26 1.2 2"
