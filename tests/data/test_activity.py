"""What loader processes do is visible from the trainer: who waits for which shard, and for how long."""

import multiprocessing
import time

from clip_train.data.activity import Activity, Doing


def names(source, shard):
    return f"source{source}/{shard:05d}.tar"


def test_workers_are_grouped_by_what_they_do_and_the_longest_wait_is_told():
    activity = Activity(4)
    assert activity.describe(names) == "4 of 4 workers starting"
    for worker in (0, 1, 3):
        activity.note(Doing.reading, worker=worker, source=1, shard=12)
    activity.note(Doing.idle, worker=2)
    time.sleep(1.01)
    activity.note(Doing.reading, worker=3, source=1, shard=12)
    said = activity.describe(names)
    assert said == "3 of 4 workers reading source1/00012.tar for 1 s, 1 of 4 workers idle for 1 s"


def test_a_trainer_that_loads_by_itself_says_so():
    activity = Activity(0)
    activity.note(Doing.decoding, worker=0, source=0, shard=3)
    assert activity.describe(names) == "the trainer itself is decoding source0/00003.tar for 0 s"


def read(activity):
    activity.note(Doing.reading, worker=1, source=2, shard=7)


def test_a_note_of_another_process_is_seen():
    activity = Activity(2)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=read, args=(activity,))
    process.start()
    process.join()
    assert "1 of 2 workers reading source2/00007.tar" in activity.describe(names)


def test_retries_of_all_processes_add_up():
    activity = Activity(3)
    for worker, number in ((0, 2), (2, 1), (2, 4), (1, 0)):
        activity.count_retries(number, worker=worker)
    assert activity.retries == 7
    assert activity.describe(names) == "3 of 3 workers starting"
