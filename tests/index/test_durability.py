"""What survives a kill, and a state machine against a dict."""

import os
import signal
import subprocess
import sys

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vitembed.index import Index

# Adds, replaces and removes without end; says so after each call has returned.
WRITER = """
import sys
import numpy as np
from vitembed.index import Index
index = Index.open(sys.argv[1])
random = np.random.default_rng(int(sys.argv[2]))
start = int(sys.argv[3])
for step in range(start, start + 10_000):
    size = int(random.integers(1, 60))
    vectors = random.standard_normal((size, 16)).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index.add([f"{step}/{n}" for n in range(size)], vectors, [{"step": step, "size": size}] * size)
    print("added", step, size, flush=True)
    if step % 3 == 0:
        index.remove([f"{step}/{n}" for n in range(size)])
        print("removed", step, size, flush=True)
"""


def test_a_killed_writer_loses_nothing_acknowledged_and_leaves_nothing_half_done(tmp_path):
    path = tmp_path / "x.index"
    Index.create(path, 16).close()
    random = np.random.default_rng(0)
    sizes, removed = {}, set()
    for trial in range(10):
        command = [sys.executable, "-c", WRITER, str(path), str(trial), str(trial * 10_000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = [process.stdout.readline() for _ in range(int(random.integers(1, 25)))]
            os.kill(process.pid, signal.SIGSTOP) if trial % 2 else None  # not always at the moment of a line
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        for verb, step, size in (line.split() for line in lines if line.endswith("\n")):
            sizes[int(step)] = int(size)
            if verb == "removed":
                removed.add(int(step))
        with Index.open(path) as index:
            assert index.check() == []
            found = {}
            for name in index.ids():
                found.setdefault(int(name.split("/")[0]), []).append(name)
            for members in found.values():
                assert len(members) == index.get(members[0]).metadata["size"], "half of an add"
            assert not removed & set(found), "an acknowledged removal is undone"
            # The last step that was acknowledged as added may be removed already, without the time to say so.
            missing = set(sizes) - removed - set(found)
            assert missing <= {step for step in [max(sizes)] if step % 3 == 0}
            removed |= missing


class IndexMachine(RuleBasedStateMachine):
    """Against a dict from id to (vector, metadata), in the order of insertion, and brute force."""

    NAMES = (*"abcdefgh", "ä", "猫/😀.png")

    @initialize()
    def create(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.index = Index.create(self.folder.name + "/x.index", 4)
        self.reader = Index.open(self.index.path)
        self.model = {}

    @rule(names=st.lists(st.sampled_from(NAMES), unique=True, max_size=5), seed=st.integers(0, 20))
    def add(self, names, seed):
        vectors = np.random.default_rng(seed).integers(-2, 3, (len(names), 4)) + np.float32([0.1, 0, 0, 0])
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.index.add(names, vectors, [{"seed": seed, "n": n} for n in range(len(names))])
        for n, name in enumerate(names):
            self.model.pop(name, None)
            self.model[name] = (vectors[n], {"seed": seed, "n": n})

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=4))
    def remove(self, names):
        assert self.index.remove(names, missing_ok=True) == len(set(names) & set(self.model))
        for name in names:
            self.model.pop(name, None)

    @rule()
    def reopen(self):
        self.index.close()
        self.index = Index.open(self.index.path)

    @rule(seed=st.integers(0, 20))
    def roll_back(self, seed):
        try:
            with self.index.transaction():
                self.index.add(["rolled back", "a"], np.eye(4, dtype=np.float32)[:2])
                self.index.search(np.eye(4, dtype=np.float32)[seed % 4])
                raise KeyError
        except KeyError:
            pass

    @rule(seed=st.integers(0, 100), k=st.integers(1, 12), wanted=st.none() | st.integers(0, 20))
    def search(self, seed, k, wanted):
        query = np.random.default_rng(seed).integers(-2, 3, 4) + np.float32([0, 0.1, 0, 0])
        query = (query / np.linalg.norm(query)).astype(np.float32)
        entries = [
            (-float((vector.astype(np.float64) * query).sum()), order, name, metadata)
            for order, (name, (vector, metadata)) in enumerate(self.model.items())
            if wanted is None or metadata["seed"] == wanted
        ]
        expected = [(name, metadata) for _, _, name, metadata in sorted(entries, key=lambda entry: entry[:2])[:k]]
        where = None if wanted is None else {"seed": wanted}
        for index in (self.index, self.reader):
            [hits] = index.search(query, k=k, where=where)
            assert [(hit.id, hit.metadata) for hit in hits] == expected

    @invariant()
    def same_entries(self):
        if not hasattr(self, "index"):
            return
        for index in (self.index, self.reader):
            assert index.ids() == list(self.model)
            assert len(index) == len(self.model)
        for name, (vector, metadata) in self.model.items():
            record = self.reader.get(name)
            assert record.metadata == metadata
            np.testing.assert_array_equal(record.vector, vector)

    def teardown(self):
        if hasattr(self, "index"):
            assert self.index.check() == []
            self.index.close()
            self.reader.close()
            self.folder.cleanup()


IndexMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestIndexAgainstADict = IndexMachine.TestCase
