"""Goal: drafts come where a text repeats itself, are right where it goes on repeating, and stop where it does
not. Method: sequences of numbers, grown as a batch grows them."""

from __future__ import annotations

from fieldmesh.core.lookup import AGREEMENT_TOKENS_MIN, Lookup

TEXT = tuple(range(100, 160))


def test_a_text_that_repeats_nothing_has_no_drafts() -> None:
    lookup, tokens = Lookup(), list(TEXT)
    for token in range(200, 260):
        tokens.append(token)
        assert lookup.draft(tokens, 15) == ()


def test_a_text_that_is_copied_is_foreseen_in_ever_longer_drafts() -> None:
    lookup, tokens, lengths = Lookup(), [*TEXT, 1, 2, 3], []
    while len(tokens) < 2 * len(TEXT) + 3:
        draft = lookup.draft(tokens, 15)
        rest = TEXT[len(tokens) - len(TEXT) - 3 :]
        assert draft == rest[: len(draft)] or len(draft) > len(rest)
        lengths.append(len(draft))
        tokens.extend(rest[: len(draft) + 1])
        if draft:
            lookup.judge(len(draft), len(draft), 0.5)
    assert lengths == [0] * AGREEMENT_TOKENS_MIN + [4, 9, 15, 15, 15]


def test_a_copy_is_gone_on_with_where_its_beginning_stands_at_two_places() -> None:
    """Of two places that agree in the last few tokens, the one that agrees for longer is right."""
    lookup, tokens = Lookup(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 70, 71, 5, 6, 7, 80, 81, 82]
    for token in (1, 2, 3, 4):
        tokens.append(token)
        draft = lookup.draft(tokens, 15)
    assert draft == (5, 6, 7, 8)
    tokens += [5, 6, 7]
    assert lookup.draft(tokens, 15)[:2] == (8, 9)


def test_a_draft_is_no_longer_than_it_may_be() -> None:
    assert Lookup().draft([*TEXT, *TEXT[:20]], 7) == TEXT[20:27]


def test_a_draft_that_reaches_the_end_goes_on_with_what_it_foresaw() -> None:
    assert Lookup().draft([1, 2, 3, 4, 5] * 3 + [1, 2], 9) == (3, 4, 5, 1, 2, 3, 4, 5, 1)


def test_drafts_that_do_not_pay_need_more_agreement_and_those_that_do_need_less_again() -> None:
    lookup = Lookup()
    eight = [*TEXT, *TEXT[:8]]
    assert len(lookup.draft(eight, 15)) == 8
    lookup.judge(8, 3, 0.5)
    assert len(lookup.draft(eight, 15)) == 8  # eight agree, eight are needed now
    lookup.judge(8, 0, 0.5)
    assert lookup.draft(eight, 15) == ()
    lookup.judge(8, 4, 0.5)
    assert len(lookup.draft(eight, 15)) == 8


def test_where_a_drafted_token_costs_as_much_as_a_drawn_one_only_perfect_drafts_pay() -> None:
    lookup, tokens = Lookup(), [*TEXT, *TEXT[:5]]
    lookup.judge(4, 3, 1.0)
    assert lookup.draft(tokens, 15) == ()
