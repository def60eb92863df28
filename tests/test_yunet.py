"""YuNet's rows become ours: on made-up weights in the real file's layout, which find a face where a colour shines."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from vacli.extract.faces import ARCFACE_112
from vacli.extract.people import People, Person
from vacli.extract.weights import WEIGHTS_DIR, EncoderError
from vacli.extract.yunet import OUTPUTS, YuNet

# A face is found where a whole cell shines in the colour of its stride; channels as OpenCV hands them over, BGR.
CHANNEL = {8: 0, 16: 1, 32: 2}
COLOUR = {8: (0, 0, 255), 16: (0, 255, 0), 32: (255, 0, 0)}  # RGB
SIDE_PX = {8: 30.0, 16: 40.0, 32: 60.0}  # of the face found, pixels of the net's input
OFF = (0.5, 0.25)  # of its middle from the cell's corner, cells
# The subject's right eye first, which is the left one in the picture.
PLACES = ARCFACE_112 / 112 - 0.5  # from the middle, sides of the box


def made_up(path: Path, names: list[str] = OUTPUTS) -> Path:
    """An .onnx with the inputs and outputs of face_detection_yunet_2023mar, whose weights are all zeros and biases."""
    nodes, weights = [], []

    def conv(name: str, stride: int, kernel: np.ndarray, bias: np.ndarray, last: str) -> None:
        weights.append(onnx.numpy_helper.from_array(kernel.astype(np.float32), f"{name}.w"))
        weights.append(onnx.numpy_helper.from_array(bias.astype(np.float32), f"{name}.b"))
        weights.append(onnx.numpy_helper.from_array(np.array([1, -1, len(bias)]), f"{name}.s"))
        sides = {"kernel_shape": [stride] * 2, "strides": [stride] * 2}
        nodes.append(helper.make_node("Conv", ["input", f"{name}.w", f"{name}.b"], [f"{name}.c"], **sides))
        nodes.append(helper.make_node("Transpose", [f"{name}.c"], [f"{name}.t"], perm=[0, 2, 3, 1]))
        nodes.append(helper.make_node("Reshape", [f"{name}.t", f"{name}.s"], [f"{name}.r"]))
        nodes.append(helper.make_node(last, [f"{name}.r"], [name]))

    for stride, side in SIDE_PX.items():
        shines = np.zeros((1, 3, stride, stride))
        shines[0] = -1.0
        shines[0, CHANNEL[stride]] = 1.0  # the other colours count against it: white and grey are no face
        conv(f"cls_{stride}", stride, shines * 0.1 / stride**2, np.array([-15.0]), "Sigmoid")
        conv(f"obj_{stride}", stride, shines * 0, np.array([15.0]), "Sigmoid")
        for what, bias in (
            ("bbox", np.array([*OFF, *np.log([side / stride] * 2)])),
            ("kps", (np.array(OFF) + PLACES * side / stride).ravel()),
        ):
            conv(f"{what}_{stride}", stride, np.zeros((len(bias), 3, stride, stride)), bias, "Identity")
    outs = []
    for name in names:
        what, stride = name.split("_")
        shape = [1, (640 // int(stride)) ** 2, {"bbox": 4, "kps": 10}.get(what, 1)]
        outs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    frame = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 640, 640])
    graph = helper.make_graph(nodes, "yunet", [frame], outs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return made_up(tmp_path_factory.mktemp("weights") / "yunet.onnx")


def frame(*cells: tuple[int, int, int], size: tuple[int, int] = (240, 320), zoom: int = 1) -> np.ndarray:
    """(H, W, 3): black, but for cells (stride, row, column) in the colour of their stride."""
    rgb = np.zeros((*size, 3), np.uint8)
    for stride, row, column in cells:
        rgb[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = COLOUR[stride]
    return rgb.repeat(zoom, axis=0).repeat(zoom, axis=1)


def expected(stride: int, row: int, column: int, zoom: float = 1) -> np.ndarray:
    """(14,): the box and the points of the face found for a cell."""
    middle = (np.array([column, row]) + OFF) * stride
    half = SIDE_PX[stride] / 2
    points = (middle + PLACES * SIDE_PX[stride]).ravel()
    return np.concatenate([middle - half, middle + half, points]) * zoom


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_a_face_of_any_stride_lies_where_it_was_found_with_our_columns(stride, file):
    cell = (stride, 3, 64 // stride)
    ((found,), nothing) = YuNet(file)(np.stack([frame(cell), frame()]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:14], expected(*cell), atol=1e-3)
    assert 0.9 < found[14] <= 1
    assert nothing.shape == (0, 15)


def test_the_left_eye_of_the_picture_comes_first(file):
    ((found,),) = YuNet(file)(frame((32, 3, 4))[None])
    x, y = found[4:14:2], found[5:14:2]
    assert x[0] < x[2] < x[1]
    assert x[3] < x[4]
    assert max(y[:2]) < y[2] < min(y[3:])


@pytest.mark.parametrize("zoom", [2, 3])
def test_faces_of_large_frames_are_given_in_their_own_pixels(zoom, file):
    cell = (32, 3, 5)
    ((found,),) = YuNet(file)(frame(cell, zoom=zoom)[None])
    np.testing.assert_allclose(found[:14], expected(*cell, zoom), atol=1e-2)


def test_frames_whose_sides_no_stride_divides_are_not_stretched(file):
    cell = (32, 2, 3)
    ((found,),) = YuNet(file)(frame(cell, size=(201, 333))[None])
    np.testing.assert_allclose(found[:14], expected(*cell), atol=1e-3)


def test_one_detector_takes_frames_of_one_size_after_another(file):
    detector = YuNet(file)
    for size in ((240, 320), (120, 200), (240, 320)):
        ((found,),) = detector(frame((16, 2, 3), size=size)[None])
        np.testing.assert_allclose(found[:14], expected(16, 2, 3), atol=1e-3)


def test_several_faces_come_best_first_and_doubles_are_dropped(file):
    rgb = frame((32, 1, 1), (32, 5, 7), (16, 3, 17))
    rgb[32:64, 32:64, 0] = 160  # red, but less so
    (found,) = YuNet(file)(rgb[None])
    assert len(found) == 3
    assert (np.diff(found[:, 14]) <= 0).all()
    np.testing.assert_allclose(found[2, :14], expected(32, 1, 1), atol=1e-3)
    (found,) = YuNet(file)(frame((32, 3, 4), (32, 3, 5), (16, 6, 9))[None])
    assert len(found) == 2  # the third overlaps the others by more than it may


def test_faces_smaller_than_mtcnn_looks_for_are_left_out(file):
    assert len(YuNet(file)(frame((8, 9, 9))[None])[0]) == 1
    small = frame((8, 9, 9), size=(240, 320), zoom=1)
    tall = np.zeros((320, 320, 3), np.uint8)
    tall[:240] = small  # made smaller by 240/320: 8 pixels shine no more alone in a cell
    assert len(YuNet(file)(tall[None])[0]) == 0


def test_the_recipe_names_the_weights_and_needs_no_opencv(file, tmp_path):
    recipe = People(str(file)).recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["detector"]["name"] == "yunet"
    other = tmp_path / "other.onnx"
    other.write_bytes(file.read_bytes() + b"\0")
    assert People(str(other)).recipe() != recipe
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(file.read_bytes())
    assert People(str(copy)).recipe() == recipe


def test_people_are_followed_by_yunet(file):
    times_s = np.arange(30) / 30
    moving = np.stack([np.roll(frame((32, 3, 3)), 32 * (i // 10), axis=1) for i in range(30)])
    people = People(str(file))([(moving[:16], times_s[:16]), (moving[16:], times_s[16:])])
    assert people.values.shape == (30, 1, 15)
    main = Person("main")(people).values
    for i in (0, 9, 10, 25):
        np.testing.assert_allclose(main[i, :14], expected(32, 3, 3 + i // 10), atol=1e-2)


def test_it_is_found_by_name_among_the_weights(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(WEIGHTS_DIR, raising=False)
    with pytest.raises(
        EncoderError, match=r"no yunet.onnx or face_detection_yunet_2023mar.onnx in ./weights"
    ):
        People("yunet")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "face_detection_yunet_2023mar.onnx").write_bytes(file.read_bytes())
    monkeypatch.setenv(WEIGHTS_DIR, str(folder))
    assert People("yunet").recipe() == People(str(file)).recipe()


def test_missing_and_foreign_files_are_refused_before_anything_is_decoded(tmp_path):
    with pytest.raises(EncoderError, match=r"no face detector at .*nowhere.onnx \(No such file"):
        People(str(tmp_path / "nowhere.onnx"))
    with pytest.raises(EncoderError, match="no such face detector: 'haar'; wanted mtcnn, yunet, or"):
        People("haar")
    other = made_up(tmp_path / "other.onnx", names=OUTPUTS[:-1])
    other.write_bytes(other.read_bytes().replace(b"kps_32", b"loc_32"))
    with pytest.raises(EncoderError, match=r"other.onnx is no YuNet: it has no output kps_32"):
        People(str(other))
    (tmp_path / "text.onnx").write_text("a page that says not found")
    with pytest.raises(EncoderError, match="is no YuNet"):
        People(str(tmp_path / "text.onnx"))


def test_what_opencv_cannot_run_is_no_traceback_of_its_own(file, tmp_path, capfd):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(" ".join(OUTPUTS).encode())
    with pytest.raises(EncoderError, match=r"OpenCV \d.* cannot run .*broken.onnx"):
        YuNet(broken)(frame()[None])
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(" ".join(OUTPUTS).encode() + file.read_bytes()[:2000])
    with pytest.raises(EncoderError, match="cannot run"):
        YuNet(cut)(frame()[None])
    YuNet(file)(frame()[None])
    assert capfd.readouterr().err == ""


def test_it_travels_to_other_processes_and_threads_do_not_mix_their_frames(file):
    detector = pickle.loads(pickle.dumps(YuNet(file)))
    cells = [(32, row, column) for row in range(1, 5) for column in range(1, 7)]

    def look(n: int) -> bool:
        cell = cells[n % len(cells)]
        size = ((240, 320), (200, 280), (180, 300))[n % 3]
        ((found,),) = detector(frame(cell, size=size)[None])
        return np.allclose(found[:14], expected(*cell), atol=1e-3)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(48)))
