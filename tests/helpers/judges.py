"""A verifier and a scorer that untrained models pass now and then, for commands that tests start."""


def even(reference, answer):
    """Whether the answer has an even number of characters."""
    return len(answer) % 2 == 0


def lengths(messages, answers):
    """Longer answers are better; the same number counts for two neighbouring lengths, so that scores can be equal."""
    return [len(answer) // 2 for answer in answers]
