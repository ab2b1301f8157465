from orchestrator.checkpoint.retention import best_checkpoints

VALIDATIONS = ((0, 5.0), (9, 3.0), (19, 2.0), (29, 2.5))


def test_a_checkpoint_has_the_loss_of_the_newest_validation_up_to_it() -> None:
    assert best_checkpoints((9, 14, 24, 29), VALIDATIONS, 1) == (24,)
    assert best_checkpoints((9, 14, 24, 29), VALIDATIONS, 2) == (24, 29)


def test_of_equals_the_later_is_better() -> None:
    assert best_checkpoints((20, 24), VALIDATIONS, 1) == (24,)


def test_one_that_was_never_validated_is_not_among_the_best() -> None:
    assert best_checkpoints((3, 12), VALIDATIONS[1:], 5) == (12,)
    assert best_checkpoints((3,), (), 1) == ()
    assert best_checkpoints((9,), VALIDATIONS, 0) == ()
