"""The heat map of experts' loads: which panels it has, and what their cells show."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from orchestrator.policy.health.expert_load import LoadMap
from orchestrator.tracking.load_chart import FILE, MOST_LAYERS, MOST_LOAD, draw_loads, load_figure


def _map(num_layers: int, num_experts: int = 4, steps: tuple[int, ...] = (0, 5, 10, 12)) -> LoadMap:
    return LoadMap(steps, np.ones((num_layers, num_experts, len(steps))))


def test_a_panel_shows_the_loads_of_its_layer_where_its_steps_are() -> None:
    loads = _map(2)
    loads.load_LES[1, :, 2] = (4.0, 0.0, 0.0, 0.0)
    loads.load_LES[1, :, 1] = np.nan
    figure = load_figure(loads, "demo")
    upper, lower, legend = figure.axes
    assert [axes.get_title("left") for axes in (upper, lower)] == ["MoE layer 0", "MoE layer 1"]
    assert lower.get_xlabel() == "step" and {axes.get_ylabel() for axes in (upper, lower)} == {"expert"}
    assert legend.get_ylabel() == "load of an expert / mean load"
    (mesh,) = lower.collections
    assert isinstance(mesh, QuadMesh)
    shown = mesh.get_array()
    assert shown is not None and shown[0].tolist() == [1.0, None, 4.0, 1.0]
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [-2.5, 2.5, 7.5, 11.0, 13.0]
    colours = mesh.cmap(mesh.norm([0.0, 1.0, MOST_LOAD, 10.0]))
    assert colours[1][:3].min() > 0.95, "the mean load is white"
    assert (colours[2] == colours[3]).all() and not np.allclose(colours[0], colours[2])
    assert lower.get_ylim() == (3.5, -0.5)


@pytest.mark.parametrize(
    "num_layers", [1, 4, 5, 7, 12], ids=["one", "a column", "two columns", "an empty place", "the most"]
)
def test_every_layer_has_one_panel(num_layers: int) -> None:
    figure = load_figure(_map(num_layers), "demo")
    panels = [axes for axes in figure.axes[:-1] if axes.get_visible()]
    assert sorted(axes.get_title("left") for axes in panels) == sorted(f"MoE layer {n}" for n in range(num_layers))
    assert "least even" not in figure.get_suptitle()


def test_of_many_layers_the_least_even_are_shown_and_the_title_has_their_number() -> None:
    loads = _map(30)
    uneven = list(range(1, 2 * MOST_LAYERS, 2))
    loads.load_LES[uneven, 0] = 2.0
    loads.load_LES[:, :, 1] = np.nan
    figure = load_figure(loads, "demo")
    titles = {axes.get_title("left") for axes in figure.axes[:-1]}
    assert titles == {f"MoE layer {layer}" for layer in uneven}
    assert figure.get_suptitle() == "demo: loads of experts, the 12 least even of 30 MoE layers"


def test_the_picture_of_one_step_is_written_and_without_experts_there_is_none(tmp_path: Path) -> None:
    assert draw_loads({3: ()}, "demo", tmp_path) == draw_loads({}, "demo", tmp_path) == ()
    assert list(tmp_path.iterdir()) == []
    (png,) = draw_loads({3: ((5, 1), (0, 0))}, "demo", tmp_path)
    assert png == tmp_path / FILE and png.read_bytes().startswith(b"\x89PNG")


def test_steps_from_which_on_experts_were_placed_by_load_are_marked_in_each_panel() -> None:
    loads = _map(2)
    marked = load_figure(LoadMap(loads.steps, loads.load_LES, moves=(6, 11)), "demo")
    for axes in marked.axes[:2]:
        assert [line.get_xdata()[0] for line in axes.lines] == [5.5, 10.5]  # type: ignore[index]
    assert "dashed: experts were placed by load" in marked.get_suptitle()
    assert "dashed" not in load_figure(loads, "demo").get_suptitle()
