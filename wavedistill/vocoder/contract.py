"""What a trained model expects and gives, for whoever makes log-mels for it."""

import math
from pathlib import Path
from typing import Any

from wavedistill import __version__
from wavedistill.models.checkpoint import VERSION, load_model
from wavedistill.speech.audio import MEL_FLOOR
from wavedistill.vocoder.vocoder import Vocoder

Contract = dict[str, dict[str, Any]]


def contract(path: Path) -> Contract:
    """The figures of a checkpoint as plain values, of its log-mels, waveforms, model and file; samples, Hz and dB.

    Raises:
        CheckpointError: if there is none at the path.
    """
    loaded = load_model(path)
    recipe, heard, model = loaded.recipe, loaded.heard, loaded.model
    vocoder, units = Vocoder(loaded.name, recipe, heard, model), recipe.audio
    return {
        "log_mel": {
            "sample_rate": units.sample_rate,
            "hop_length": units.hop_length,
            "n_fft": units.n_fft,
            "window": "hann",
            "padding": units.overlap,
            "n_mels": units.n_mels,
            "f_min": units.f_min,
            "f_max": units.f_max,
            "mel_scale": "slaney",
            "norm": "slaney",
            "power": 1,
            "logarithm": "natural",
            "floor": MEL_FLOOR,
            "mean": heard.mel_mean,
            "std": heard.mel_std,
        },
        "waveform": {
            "sample_rate": units.sample_rate,
            "level_db": units.level_db,
            "f0_low": heard.f0_low,
            "f0_high": heard.f0_high,
        },
        "model": {
            "name": loaded.name,
            "recipe": recipe.name,
            "kind": recipe.models[loaded.name].kind,
            "step": loaded.step,
            "weights": sum(weight.numel() for weight in model.parameters()),
            "flops_per_sample": model.flops_per_sample,
            "receptive_field": max(network.receptive_field for network in model.networks),
            "passes": recipe.consistency.passes,
            "in_parallel": model.draws_in_parallel,
            "latency": vocoder.latency if model.streams else None,
        },
        "file": {
            "bytes": path.stat().st_size,
            "format": VERSION,
            "licence": recipe.corpus.licence,
            "read_by": f"wavedistill {__version__}",
        },
    }


def in_words(figures: Contract) -> str:
    """The same on a page."""
    mel, wave, model, file = figures.values()
    rate = mel["sample_rate"]

    def time(samples: int) -> str:
        return f"{samples} samples, {1000 * samples / rate:.1f} ms"

    voice = "unknown" if wave["f0_low"] is None else f"{wave['f0_low']:.0f} to {wave['f0_high']:.0f} Hz"
    streamed = f"no: it draws {'all at once' if model['in_parallel'] else 'sample by sample'}"
    if model["latency"] is not None:
        streamed = f"{time(model['latency'])} behind its input"
    rows = {
        "log-mel": f"(n_mels, frames), natural logarithm of mel-filtered magnitudes (power {mel['power']})",
        "  sample rate": f"{rate} Hz",
        "  hop_length": time(mel["hop_length"]),
        "  n_fft": f"{time(mel['n_fft'])}, Hann window",
        "  padding": f"{mel['padding']} zeros at either end, then frames without centring",
        "  n_mels": f"{mel['n_mels']}, from f_min {mel['f_min']:g} to f_max {mel['f_max']:g} Hz",
        "  mel scale": "Slaney's, filters normalised to area 1 (librosa's default)",
        "  floor": f"{mel['floor']:g}, so that values are {math.log(mel['floor']):.2f} or more",
        "waveform": f"frames x {mel['hop_length']} samples, mono",
        "  level": f"{wave['level_db']:g} dB RMS relative to full scale, in the training",
        "  voice": f"{voice}, nine of ten voiced frames of the training",
        "model": f"{model['name']} of {model['recipe']}, {model['kind']}, step {model['step']}",
        "  weights": f"{model['weights']:,}; {model['flops_per_sample'] / 1e6:.3f} MFLOP a sample",
        "  receptive field": time(model["receptive_field"]),
        "  mel consistency": f"{model['passes']} passes",
        "  streamed": streamed,
        "file": f"{file['bytes']:,} bytes, format {file['format']}, read by {file['read_by']}",
        "  licence": file["licence"] or "not said",
    }
    return "\n".join(f"{label:<18}{text}" for label, text in rows.items())
