from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from sartor.data import InTime, Signature, Split, load_data, score
from sartor.data_sources import authors_code
from sartor.errors import PlanError, UsageError


def arrays(n=20, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)).astype(dtype), rng.integers(0, 4, size=n)


def write_source(tmp_path, body):
    path = tmp_path / "source.py"
    path.write_text("import numpy as np\nX = np.zeros((4, 3), 'float32')\nY = np.zeros(4, int)\n" + body)
    return f"{path}:load"


# ---- npz -------------------------------------------------------------------------------------------
def test_npz_is_split_by_seed_without_overlap(tmp_path):
    x, y = arrays(200)
    x[:, 0] = np.arange(200)
    np.savez(tmp_path / "d.npz", x=x, labels=y)
    data = load_data(str(tmp_path / "d.npz"), ["x"], seed=1)

    def rows(split):
        return [int(v) for inputs, _ in split for v in inputs["x"][:, 0]]

    parts = [rows(s) for s in (data.train, data.evaluate, data.test)]
    assert [len(p) for p in parts] == [140, 30, 30]
    assert sorted(row for part in parts for row in part) == list(range(200))
    assert rows(data.train) == parts[0], "a second iteration must give the same batches"
    assert not data.test_is_evaluate
    for inputs, labels in data.train:
        assert (labels == y[inputs["x"][:, 0].astype(int)]).all()
    other = load_data(str(tmp_path / "d.npz"), ["x"], seed=2)
    assert rows(other.test) != parts[2]


def test_npz_array_called_inputs_stands_for_the_only_input(tmp_path):
    x, _ = arrays()
    np.savez(tmp_path / "d.npz", inputs=x)
    data = load_data(str(tmp_path / "d.npz"), ["image"])
    inputs, labels = next(iter(data.evaluate))
    assert set(inputs) == {"image"} and labels is None
    with pytest.raises(UsageError, match="name one array after each input"):
        load_data(str(tmp_path / "d.npz"), ["a", "b"])


class Resizing:
    """As much of a program as `load_data` looks at."""

    input_shapes: ClassVar = {"factor": (), "sizes": (2,), "image": (1, 3)}

    def __init__(self, carriers=("image",)):
        self.batch = SimpleNamespace(symbolic=bool(carriers), inputs=carriers)

    def types(self):
        kinds = {"sizes": np.int64}
        return {n: SimpleNamespace(numpy=lambda n=n: kinds.get(n, np.float32)) for n in self.input_shapes}


def test_npz_arrays_of_the_models_own_shape_are_constants(tmp_path):
    x, y = arrays(20)
    path = tmp_path / "d.npz"
    np.savez(path, factor=np.float32(2.0), sizes=np.int64([8, 9]), image=x, labels=y)
    data = load_data(str(path), list(Resizing.input_shapes), program=Resizing())
    inputs, labels = data.train.first()
    assert inputs["image"].shape == (14, 3) and labels.shape == (14,)
    assert inputs["factor"] == 2.0 and inputs["sizes"].tolist() == [8, 9]
    np.savez(path, factor=np.float32(2.0), sizes=np.zeros((20, 2), np.int64), image=x)
    with pytest.raises(UsageError, match=r"'sizes' has shape \[14, 2\], but the model takes \[2\]"):
        load_data(str(path), list(Resizing.input_shapes), program=Resizing())


def test_npz_of_one_fixed_batch_is_too_little(tmp_path):
    path, fixed = tmp_path / "d.npz", Resizing(())
    np.savez(path, factor=np.float32(2.0), sizes=np.int64([8, 9]), image=np.zeros((1, 3), "f4"))
    with pytest.raises(UsageError, match="has one batch of the model's fixed shapes; at least 3 are needed"):
        load_data(str(path), list(fixed.input_shapes), program=fixed)
    np.savez(path, factor=np.float32(2.0), sizes=np.int64([8, 9]), image=np.zeros((9, 3), "f4"))
    data = load_data(str(path), list(fixed.input_shapes), program=fixed)
    assert data.train.first()[0]["image"].shape == (1, 3)


def test_npz_is_never_unpickled(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([{}, {}, {}], dtype=object))
    with pytest.raises(UsageError, match=r"cannot be read as an \.npz of plain arrays"):
        load_data(str(tmp_path / "d.npz"), ["x"])


@pytest.mark.parametrize(
    ("save", "message"),
    [
        ({"y": np.zeros((5, 3), "f4")}, r"has the arrays \['y'\]"),
        ({"x": np.zeros((5, 3), "f4"), "labels": np.zeros(4)}, "different lengths"),
        ({"x": np.zeros((2, 3), "f4")}, "at least 3"),
    ],
)
def test_npz_refusals(tmp_path, save, message):
    np.savez(tmp_path / "d.npz", **save)
    with pytest.raises(UsageError, match=message):
        load_data(str(tmp_path / "d.npz"), ["x"])


def test_missing_and_truncated_files_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_data(str(tmp_path / "none.npz"), ["x"])
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UsageError, match="cannot be read") as error:
        load_data(str(tmp_path / "bad.npz"), ["x"])
    assert "\n" not in str(error.value)


def test_fingerprint_tells_content_apart(tmp_path):
    found = []
    for _ in range(2):
        for scale in (1, 2):
            np.savez(tmp_path / "d.npz", x=scale * arrays()[0], labels=arrays()[1])
            found.append(load_data(str(tmp_path / "d.npz"), ["x"]).fingerprint())
    assert found[0] == found[2] != found[1] == found[3]


# ---- functions -------------------------------------------------------------------------------------
def test_function_with_evaluate_only_falls_back(tmp_path):
    spec = write_source(tmp_path, "def load(): return {'evaluate': [({'x': X}, Y)]}")
    data = load_data(spec, ["x"])
    assert data.train is None and data.calibration is data.evaluate and data.test is data.evaluate
    assert data.test_is_evaluate and data.source == "source.py:load"


def test_function_extras_and_sibling_imports(tmp_path):
    (tmp_path / "sibling_of_source.py").write_text("VALUE = 0.25\n")
    spec = write_source(
        tmp_path,
        "import sibling_of_source as s\n"
        "def load():\n"
        "    s_ = [({'x': X}, Y)]\n"
        "    return {'train': s_, 'evaluate': s_, 'test': s_, 'metric': lambda o, y: s.VALUE}\n",
    )
    data = load_data(spec, ["x"])
    assert data.calibration is data.train
    assert score(lambda i: {"y": i["x"]}, data.test, data.metric) == (0.25, 4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def load(): return {'evaluate': (b for b in [({'x': X}, Y)])}", "only once"),
        ("def load(): return {'evaluate': []}", "is empty"),
        ("def load(): return {'evaluate': [({'x': X[:0]}, Y[:0])]}", "no samples"),
        ("def load(): return {'evaluate': [({'z': X}, Y)]}", "names must be the same"),
        ("def load(): return {'evaluate': [({'x': X}, Y[:3])]}", "first axis of the labels"),
        ("def load(): return {'evaluate': [X]}", "expected a pair"),
        ("def load(): return {'train': [({'x': X}, Y)]}", "no split 'evaluate'"),
        ("def load(): return {'evaluate': [({'x': X}, Y)], 'valid': 1}", "unknown keys"),
        ("def load(): return [1]", "expected a mapping"),
        ("def load(): return {'evaluate': [({'x': X}, Y)], 'metric': 3}", "must be callable"),
        ("def load(): return {'evaluate': [({'x': np.array(['a'] * 4)}, Y)]}", "expected numbers"),
        ("def load(): raise RuntimeError('disk on fire')", "disk on fire"),
        ("def loads(): pass", "no function 'load'"),
        ("import nothing_of_this_name", r"import of the data file .* failed: .*source.py:4"),
    ],
)
def test_function_refusals(tmp_path, body, message):
    with pytest.raises(UsageError, match=message) as error:
        load_data(write_source(tmp_path, body), ["x"])
    assert "\n" not in str(error.value)


def test_exhausted_second_iteration_is_refused():
    class Once:
        def __init__(self):
            self.items = [({"x": np.zeros((1, 3), "f4")}, None)]

        def __iter__(self):
            while self.items:
                yield self.items.pop()

    with pytest.raises(UsageError, match="second time"):
        Split("evaluate", Once(), ["x"])


@pytest.mark.parametrize(
    ("array", "any_batch", "message"),
    [
        (np.zeros((4, 3), "f8"), True, r"is float64, but the model takes float32"),
        (np.zeros((4, 5), "f4"), True, r"has shape \[4, 5\], but the model takes \[N, 3\]"),
        (np.zeros((4, 3, 1), "f4"), True, r"but the model takes \[N, 3\]"),
        (np.zeros((4, 3), "f4"), False, r"but the model takes \[1, 3\]"),
        (np.full((4, 3), np.nan, "f4"), True, "NaN"),
    ],
)
def test_batches_are_checked_against_the_model(array, any_batch, message):
    expected = {"x": Signature(np.dtype("f4"), (1, 3), any_batch)}
    with pytest.raises(UsageError, match=message):
        Split("evaluate", [({"x": array}, None)], ["x"], expected)


IMAGE, FACTOR = Signature(np.dtype("f4"), (1, 3)), Signature(np.dtype("f4"), (), any_batch=False)
SIZES = Signature(np.dtype("i8"), (2,), any_batch=False)


def test_inputs_that_carry_no_samples_have_any_length():
    expected = {"factor": FACTOR, "sizes": SIZES, "image": IMAGE}
    batch = {"factor": np.float32(2.0), "sizes": np.int64([8, 9]), "image": np.zeros((5, 3), "f4")}
    split = Split("evaluate", [(batch, np.zeros(5, int))], list(expected), expected)
    judged = InTime(split, 60.0)
    assert len(list(judged)) == 1 and judged.samples == 5
    assert score(lambda i: {"y": np.eye(4, dtype="f4")[np.zeros(len(i["image"]), int)]}, split) == (1.0, 5)
    with pytest.raises(UsageError, match=r"has 5 samples, but labels of shape \[2\]"):
        Split("evaluate", [(batch, np.zeros(2, int))], list(expected), expected)


def test_inputs_that_carry_samples_have_one_length():
    expected = {"sizes": SIZES, "a": IMAGE, "b": IMAGE}
    batch = {"sizes": np.int64([8, 9]), "a": np.zeros((5, 3), "f4"), "b": np.zeros((4, 3), "f4")}
    with pytest.raises(UsageError, match=r"different batch sizes \{'a': 5, 'b': 4\}"):
        Split("evaluate", [(batch, None)], list(expected), expected)


def test_a_sequence_first_model_takes_its_own_shapes():
    shapes = {"x": (7, 2, 3), "h0": (1, 2, 4)}
    expected = {n: Signature(np.dtype("f4"), s, any_batch=False) for n, s in shapes.items()}
    batch = {n: np.zeros(s, "f4") for n, s in shapes.items()}
    split = Split("evaluate", [(batch, np.zeros(2, int))], list(shapes), expected)
    assert split.has_labels
    with pytest.raises(UsageError, match=r"has shape \[1, 5, 4\], but the model takes \[1, 2, 4\]"):
        Split("evaluate", [({**batch, "h0": np.zeros((1, 5, 4), "f4")}, None)], list(shapes), expected)


def test_later_batches_are_checked_too():
    good, bad = np.zeros((4, 3), "f4"), np.zeros((4, 2), "f4")
    expected = {"x": Signature(np.dtype("f4"), (1, 3))}
    split = Split("test", [({"x": good}, None), ({"x": bad}, None)], ["x"], expected)
    with pytest.raises(UsageError, match="Batch 1 of split 'test'"):
        list(split)


def test_a_source_that_dries_up_is_an_error_and_not_the_end_of_a_loop():
    batches = [({"x": np.zeros((1, 3), "f4")}, None)]
    split = Split("evaluate", batches, ["x"])
    batches.clear()
    for read in (split.first, lambda: split.has_labels):
        with pytest.raises(UsageError, match="gives no batch when it is iterated a second time"):
            read()


def test_errors_of_the_authors_code_name_it_and_the_line(tmp_path):
    spec = write_source(
        tmp_path,
        "class Late:\n"
        "    def __iter__(self):\n"
        "        yield {'x': X}, None\n"
        "        raise KeyError('gone')\n"
        "def load(): return {'evaluate': Late(), 'loss': lambda o, y: 1 / 0, 'metric': lambda o, y: 1 / 0}\n",
    )
    data = load_data(spec, ["x"])
    with pytest.raises(
        UsageError, match=r"Batch 1 of split 'evaluate' of 'source.py:load' .*\(source.py:7\)"
    ):
        list(data.evaluate)
    for name in ("loss", "metric"):
        message = rf"The {name} of 'source.py:load' failed: ZeroDivisionError: .* \(source.py:8\)"
        with pytest.raises(UsageError, match=message):
            getattr(data, name)({}, None)


def test_interrupts_and_errors_of_ours_pass_through_the_authors_code():
    for kind in (KeyboardInterrupt, PlanError):
        with pytest.raises(kind), authors_code("The metric"):
            raise kind


def test_labels_with_nan_need_a_metric_that_reads_them(tmp_path):
    body = "def load(): return {'evaluate': [({'x': X}, np.full(4, np.nan))], 'metric': lambda o, y: 0.5}\n"
    data = load_data(write_source(tmp_path, body), ["x"])
    assert np.isnan(data.evaluate.first()[1]).all()
    with pytest.raises(UsageError, match="labels with NaN or infinity; clean them, or give a 'metric'"):
        load_data(write_source(tmp_path, body.replace("'metric'", "'loss'")), ["x"])


def test_metrics_get_one_array_or_a_reason():
    split = [({"x": np.zeros((1, n), "f4")}, np.zeros(1)) for n in (2, 3)]
    with pytest.raises(UsageError, match=r"Output 'y' cannot be joined .* \[\[1, 2\], \[1, 3\]\]"):
        score(lambda inputs: {"y": inputs["x"]}, split, lambda o, y: 0.5)


def test_a_pass_in_time_decides_which_batches_every_pass_gets():
    import time

    split = [({"x": np.zeros((2, 3), "f4")}, None)] * 20
    judged = InTime(split, 0.05)
    first = 0
    for _ in judged:
        time.sleep(0.02)
        first += 1
    assert 2 <= first < 20 and judged.cut and (judged.batches, judged.samples) == (first, 2 * first)
    assert len(list(judged)) == first, "a faster pass gets no more"
    assert len(list(InTime(split, 0.0, batches=first))) == first
    whole = InTime(split, 60.0)
    assert len(list(whole)) == 20 and not whole.cut and len(list(whole)) == 20 and not whole.cut


# ---- score -----------------------------------------------------------------------------------------
def one_hot_predict(classes=4):
    return lambda inputs: {"y": np.eye(classes, dtype="f4")[inputs["x"][:, 0].astype(int)]}


def test_accuracy_is_weighted_by_samples():
    x = np.array([[0], [1], [2], [3]], "f4")
    split = [({"x": x}, np.array([0, 1, 2, 0])), ({"x": x[:1]}, np.array([1]))]
    assert score(one_hot_predict(), split) == (pytest.approx(3 / 5), 5)


def test_dense_labels_and_regression():
    logits = np.zeros((2, 3, 2, 2), "f4")
    logits[:, 1] = 1
    labels = np.ones((2, 2, 2), int)
    labels[0, 0, 0] = 0
    assert score(lambda _: {"y": logits}, [({"x": logits}, labels)])[0] == pytest.approx(7 / 8)
    out = np.full((2, 1), 1.5, "f4")
    value, _ = score(lambda _: {"y": out}, [({"x": out}, np.ones((2, 1), "f4"))])
    assert value == pytest.approx(1 / 1.5)


def test_agreement_without_labels():
    x = np.array([[0], [1]], "f4")
    split = [({"x": x}, None)]
    assert score(one_hot_predict(), split, None, one_hot_predict())[0] == 1.0
    swapped = lambda i: {"y": np.eye(4, dtype="f4")[1 - i["x"][:, 0].astype(int)]}  # noqa: E731
    assert score(one_hot_predict(), split, None, swapped)[0] == 0.0
    double = lambda i: {"y": 2 * i["x"] + 1}  # noqa: E731
    same = lambda i: {"y": i["x"] + 1}  # noqa: E731
    value, n = score(double, split, None, same)
    assert value == pytest.approx(1 / (1 + 1 / 3)) and n == 2
    with pytest.raises(UsageError, match="no labels"):
        score(one_hot_predict(), split)


@pytest.mark.parametrize("result", [1.5, -0.1, float("nan")])
def test_metric_outside_the_unit_interval_is_refused(result):
    x = np.zeros((2, 1), "f4")
    with pytest.raises(UsageError, match=r"lie in \[0, 1\]"):
        score(one_hot_predict(), [({"x": x}, np.zeros(2))], lambda o, y: result)


def test_outputs_that_hold_no_classes_are_refused():
    x = np.zeros((2, 1), "f4")
    with pytest.raises(UsageError, match="give a 'metric'"):
        score(lambda i: {"y": i["x"]}, [({"x": x}, np.zeros(2, int))])
    with pytest.raises(UsageError, match="NaN"):
        score(lambda i: {"y": i["x"] * np.nan}, [({"x": x}, np.zeros(2, int))])


# ---- the example ----------------------------------------------------------------------------------
def test_digits_example_keeps_the_contract_and_its_test_split_apart():
    from pathlib import Path

    spec = Path(__file__).parent.parent / "examples/digits/data.py"
    data = load_data(f"{spec}:digits", ["image"])

    def unaugmented(split):
        return {image.tobytes() for image in split._batches.images}

    splits = [unaugmented(s) for s in (data.train, data.evaluate, data.test)]
    assert [len(s) for s in splits] == [1100, 250, 447]
    assert not splits[2] & (splits[0] | splits[1]) and not splits[0] & splits[1]
    inputs, labels = data.train.first()
    assert inputs["image"].shape == (64, 1, 32, 32) and inputs["image"].dtype == np.float32
    assert labels.dtype.kind == "i" and abs(inputs["image"].mean()) < 0.3 < inputs["image"].std()
    first, second = (next(iter(data.train))[0]["image"] for _ in range(2))
    assert not np.array_equal(first, second), "every pass is augmented anew"
