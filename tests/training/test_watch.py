"""Who is to blame, by the beats of all ranks: nobody who moves, whoever is silent, whoever the others wait for."""

from minillm.training.watch import BEAT, QUICK, Beat, Judge


def beats(*begun: int, at: int = 0, **of_the_first) -> list[Beat]:
    usual = {"busy": None, "failed": None, "stopped": None, "done": False}
    return [
        Beat(count=at, host="here", begun=n, **{**usual, **(of_the_first if rank == 0 else {})})
        for rank, n in enumerate(begun)
    ]


def verdict(story: list[list[Beat]], limit: float = 10.0, **how):
    """What a judge says in the end who sees one list of beats a second."""
    judge = Judge(limit)
    found = [judge.look(each, float(i), **{"training": True, "quick": False, **how}) for i, each in enumerate(story)]
    assert not any(found[:-1])
    return found[-1]


def test_the_judge_blames_nobody_who_moves() -> None:
    assert verdict([beats(i, i + i % 2, at=i) for i in range(99)]) is None
    assert verdict([beats(3, 3, at=i) for i in range(99)]) is None, "all compute: nobody waits"


def test_the_judge_blames_whom_the_others_wait_for() -> None:
    stalled = [beats(3, 4, at=i) for i in range(12)]
    assert verdict(stalled[:11]) is None
    assert verdict(stalled) == (0, "stalls: the others have waited 10 s for it")
    assert verdict([beats(3, 4, at=i, busy="saving") for i in range(99)]) is None
    assert verdict(stalled, training=False) is None


def test_the_judge_blames_whose_beat_has_stopped() -> None:
    silent = [[*beats(3, at=i), *beats(3, at=0)] for i in range(99)]
    assert verdict(silent[:11]) is None
    number, what = verdict(silent[:12])
    assert number == 1 and what.startswith("gives no sign of life")
    assert verdict(silent, training=False) is None
    assert verdict(silent[:5], training=False, quick=True)[0] == 1
    assert verdict(silent[: int(QUICK)], training=False, quick=True) is None
    assert verdict([[*beats(3, at=i), *beats(3, done=True)] for i in range(99)]) is None
    assert verdict([beats(3, 3, failed="no such token")]) == (0, "failed: no such token")


def test_a_judge_who_was_stopped_himself_blames_nobody() -> None:
    judge = Judge(10.0)
    for now, count in ((0.0, 1), (BEAT, 2), (600.0, 2), (600.0 + BEAT, 3)):
        assert judge.look(beats(3, 4, at=count), now, training=True, quick=False) is None
