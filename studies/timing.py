"""Seconds of functions that alternate, so that a busy machine slows all of them."""

import statistics
import time

import torch


def side_by_side(functions: dict, device: torch.device, rounds: int) -> dict:
    """{name: function} -> {name: seconds in each round}. Each round calls them all; one more warms up."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_seconds(functions: dict, device: torch.device, rounds: int) -> dict:
    """{name: function} -> {name: median of its seconds}, see `side_by_side`."""
    seconds = side_by_side(functions, device, rounds)
    return {name: statistics.median(values) for name, values in seconds.items()}
