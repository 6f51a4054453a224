"""Speech that espeak-ng speaks, mixed with noise and turned into log-mel features.

A *rendering* is one word spoken once by one speaker. A *clip* is one second of a rendering, shifted, scaled and
mixed with noise. Evaluation shares no rendering with the rest: it speaks at odd numbers of words per minute, and
everything else at even ones.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
import wave
from dataclasses import dataclass

import numpy as np
from scipy.signal import resample_poly

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "forward", "backward")
UNKNOWN, SILENCE = len(KEYWORDS), len(KEYWORDS) + 1
KEYWORD_LABELS = (*KEYWORDS, "unknown", "silence")

# The words behind "unknown". Those for the evaluation are never heard in training, nor in what is learnt from without
# labels, which is whatever people say.
UNKNOWN_WORDS = {
    "training": (
        "house bird cat tree happy seven marvin sheila wow zero nine learn follow visual bed eight five four one "
        "three two six water music window garden table summer answer bridge candle doctor engine finger hammer "
        "island jacket kitchen letter mountain paper river silver tiger village yellow pencil orange"
    ).split(),
    "evaluation": "dog market people winter button planet school travel monkey basket ruler helmet".split(),
    "unlabelled": (
        "about above across after again air almost alone along also always animal another anything apple area around "
        "ask autumn away back ball bank basin bath beach bear beauty because become before begin behind believe below "
        "beside better between beyond bicycle black blanket blue boat body book border born both bottle bottom box "
        "bread break breakfast bring brother brown build burn butter buy call camera captain carry castle "
        "catch cause chair change cheese children church circle city class clean clear climb clock close cloud coat "
        "coffee cold colour come common cook copper corner cotton count country course cover cross cup dance dark "
        "daughter day deep desk different dinner dream dress drink drive dry early earth east easy eat edge egg empty "
        "end enough evening every example eye face fall family famous farm fast father feather feel fence field fight "
        "fire fish flat floor flower fly fold food foot forest forget fork free fresh friend from fruit full funny "
        "future gentle girl give glass gold good grass great green grey ground group grow guitar hair half hand happen "
        "harbour hard hat head hear heart heavy hill history hold holiday home honey hope horse hospital hot hour "
        "hundred hungry ice idea important inside iron job join journey judge jump keep key kind king knee knife know "
        "lady lake lamp language large last laugh lead leaf leather leave leg lemon less library lift light line lion "
        "listen little long loud love lunch machine make man many map mark match meal measure meat medicine meeting "
        "metal middle milk minute mirror modern money month moon morning mother mouth move narrow nature "
        "neck needle neighbour nest never new night noise north nose nothing notice number"
    ).split(),
    "deciding": "object ocean office open order oven owner page paint palace parent party pepper".split(),
}
# How many times as often as one keyword the unknown words together are spoken.
OFTEN = {"training": 3, "evaluation": 3, "deciding": 3, "unlabelled": 12}


@dataclass(frozen=True)
class Speaker:
    """One synthetic speaker: an espeak-ng accent with a voice variant, and the pitch it usually speaks at (0-99)."""

    voice: str
    pitch: int


SPEAKERS = (
    Speaker("en-us+m1", 40),
    Speaker("en-gb-x-rp+m3", 20),
    Speaker("en-gb-scotland+m7", 70),
    Speaker("en-029+m5", 50),
    Speaker("en-us-nyc+m4", 85),
    Speaker("en-us+f1", 50),
    Speaker("en-gb+f2", 75),
    Speaker("en-gb-scotland+f3", 30),
    Speaker("en-gb-x-gbcwmd+f5", 90),
    Speaker("en-us+croak", 30),
    Speaker("en-gb+whisper", 50),
    Speaker("en-us+klatt4", 50),
)
NO_SPEAKER = -1

RATE = 16_000
FRAMES, BANDS = 49, 40
WINDOW, HOP = 640, 320
# A feature is log2 of a band's energy, centred and scaled so that speech spans about -2..2, then rounded to the
# 1/16 grid that a fixed-point front end would deliver: a quarter of an octave of energy per step.
STEPS_PER_UNIT = 16
OCTAVES_PER_UNIT = 4.0
CENTRE_OCTAVES = -3.0
LIMIT = 2.0


def progress(text: str, last: bool = False) -> None:
    """Show one line of progress on stderr, over the line before it."""
    print(f"\r{text:<100}", end="\n" if last else "", file=sys.stderr, flush=True)


def speak(voice: str, word: str, words_per_minute: int, pitch: int) -> np.ndarray:
    """Let espeak-ng speak one word.

    Parameters
    ----------
    voice : str
        A voice as `espeak-ng -v` takes it, with a variant after a plus sign.
    word : str
        What to say.
    words_per_minute, pitch : int
        Speed, and pitch from 0 to 99.

    Returns
    -------
    numpy.ndarray
        float32 samples at 16 kHz, without leading and trailing silence, at most one second, with unit RMS.
    """
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout", word]
    done = subprocess.run(command, capture_output=True, check=True)
    with wave.open(io.BytesIO(done.stdout)) as file:
        rate = file.getframerate()
        # The header of a stream does not know its length: take what is there.
        samples = np.frombuffer(file.readframes(1 << 24), "<i2").astype(np.float32)
    step = np.gcd(rate, RATE)
    samples = resample_poly(samples, RATE // step, rate // step).astype(np.float32)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1][:RATE]
    return samples / np.sqrt(np.mean(samples**2))


@dataclass
class Rendering:
    """One word spoken once."""

    keyword: int
    speaker: int
    samples: np.ndarray


def render(split: str, per_keyword: int, seed: int) -> list[Rendering]:
    """Let every speaker say every word several times, at different speeds and pitches.

    Parameters
    ----------
    split : str
        A key of `UNKNOWN_WORDS`: speeds are odd in "evaluation", even elsewhere.
    per_keyword : int
        Renderings of every keyword by every speaker; the unknown words together are spoken as often as `OFTEN` says.
    seed : int
        Seed of the jitter.
    """
    rng = np.random.default_rng([seed, split == "evaluation", 1])
    others = UNKNOWN_WORDS[split]
    renderings = []
    start = time.monotonic()
    for index, speaker in enumerate(SPEAKERS):
        unknown = [(UNKNOWN, others[i % len(others)]) for i in range(OFTEN[split] * per_keyword)]
        for label, word in [*enumerate(KEYWORDS)] * per_keyword + unknown:
            speed = 2 * int(rng.integers(60, 100)) + (split == "evaluation")
            pitch = int(np.clip(speaker.pitch + rng.integers(-8, 9), 0, 99))
            renderings.append(Rendering(label, index, speak(speaker.voice, word, speed, pitch)))
        progress(f"{split}: speaker {index + 1}/{len(SPEAKERS)} {speaker.voice}, {time.monotonic() - start:.0f} s")
    progress(f"{split}: {len(renderings)} renderings in {time.monotonic() - start:.0f} s", last=True)
    return renderings


def place(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put a rendering at a random place in a second of silence."""
    clip = np.zeros(RATE, np.float32)
    at = int(rng.integers(0, RATE - len(samples) + 1))
    clip[at : at + len(samples)] = samples
    return clip


def noise(kind: str, renderings: list[Rendering], rng: np.random.Generator) -> np.ndarray:
    """One second of noise with unit RMS.

    Parameters
    ----------
    kind : str
        "white", "pink", "hum" (mains hum with harmonics over a little white noise) or "babble" (five voices).
    renderings : list of Rendering
        What the babble is made from.
    rng : numpy.random.Generator
        Source of randomness.
    """
    if kind == "white":
        clip = rng.standard_normal(RATE)
    elif kind == "pink":
        spectrum = np.fft.rfft(rng.standard_normal(RATE))
        clip = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 20)))
    elif kind == "hum":
        base = rng.choice([50.0, 60.0]) * rng.uniform(0.99, 1.01)
        phase = 2 * np.pi * base * np.arange(RATE) / RATE
        clip = 0.05 * rng.standard_normal(RATE)
        for harmonic in range(1, 12):
            clip += rng.uniform(0.2, 1.0) / harmonic * np.sin(harmonic * phase + rng.uniform(0, 2 * np.pi))
    else:
        chosen = rng.integers(0, len(renderings), 5)
        clip = sum(np.roll(place(renderings[i].samples, rng), rng.integers(RATE)) for i in chosen)
    clip = clip.astype(np.float32)
    return clip / np.sqrt(np.mean(clip**2))


def mel_filters() -> np.ndarray:
    """Triangular filters from 60 Hz to 7.6 kHz, equally spaced on the mel scale, as a [BANDS, bins] matrix."""
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (60.0, 7600.0))
    edges = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(1024, 1 / RATE)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


FILTERS = mel_filters()
TAPER = np.hanning(WINDOW).astype(np.float32)


def features(clip: np.ndarray) -> np.ndarray:
    """Turn one second of samples into log-mel features.

    Returns
    -------
    numpy.ndarray
        int8 [FRAMES, BANDS]: the feature in steps of 1/STEPS_PER_UNIT.
    """
    frames = np.lib.stride_tricks.sliding_window_view(clip, WINDOW)[::HOP] * TAPER
    energy = np.abs(np.fft.rfft(frames, 1024)) ** 2 @ FILTERS.T
    octaves = np.log2(energy + 1e-6)
    scaled = np.clip((octaves - CENTRE_OCTAVES) / OCTAVES_PER_UNIT, -LIMIT, LIMIT)
    return np.rint(scaled * STEPS_PER_UNIT).astype(np.int8)


def make_clips(
    renderings: list[Rendering], count: int, split: str, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix clips until there are `count` of them.

    Parameters
    ----------
    renderings : list of Rendering
        The speech, also of the babble.
    count : int
        How many clips to make; one in 16 is silence, every rendering is used about equally often.
    split : str
        Only for the seed and the progress line.
    seed : int
        Seed of shifts, levels and noise.

    Returns
    -------
    tuple of numpy.ndarray
        Features int8 [count, FRAMES, BANDS], keyword labels and speaker labels int64 [count].
    """
    rng = np.random.default_rng([seed, split == "evaluation", 2])
    audio = np.empty((count, FRAMES, BANDS), np.int8)
    keyword = np.full(count, SILENCE, np.int64)
    speaker = np.full(count, NO_SPEAKER, np.int64)
    start = time.monotonic()
    order = np.concatenate([rng.permutation(len(renderings)) for _ in range(count // len(renderings) + 1)])
    for i in range(count):
        level = 0.05 * 10 ** (rng.uniform(-8, 8) / 20)
        # Babble with nobody in front of it would be words without a label.
        kinds = ("white", "pink", "hum", "babble") if i % 16 else ("white", "pink", "hum")
        disturbance = noise(str(rng.choice(kinds)), renderings, rng)
        if i % 16:
            spoken = renderings[order[i]]
            keyword[i], speaker[i] = spoken.keyword, spoken.speaker
            decibels = float(rng.choice([5, 10, 15, 20, 30]))
            clip = place(spoken.samples, rng) + disturbance * 10 ** (-decibels / 20)
        else:
            clip = disturbance * 10 ** (rng.uniform(-30, 0) / 20)
        audio[i] = features(level * clip)
        if i % 500 == 499:
            progress(f"{split}: clip {i + 1}/{count}, {time.monotonic() - start:.0f} s")
    mixing = rng.permutation(count)
    progress(f"{split}: {count} clips in {time.monotonic() - start:.0f} s", last=True)
    return audio[mixing], keyword[mixing], speaker[mixing]
