"""Drawing a puppet: a person's sprites, and the scene of pose, light and noise they are put in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 256  # pixels of a side of the picture
SHOWN, TURNED, COVERED, AWAY = range(4)  # where the face is, frame by frame
# Unit u: one pixel of the picture at scale 1. Origin: between eyes and mouth; x to the right, y down. A sprite
# is drawn at DENSITY pixels per unit with its origin at ORIGIN, then turned and scaled into the picture.

DENSITY, ORIGIN, SPRITE = 1.25, (190.0, 150.0), (400, 380)  # the last in rows, columns
EYE_Y, MOUTH_Y = -24.0, 41.0


@dataclass
class Person:
    """What does not change within a video: colours and proportions."""

    skin: np.ndarray
    hair: np.ndarray
    lips: np.ndarray
    iris: np.ndarray
    shirt: np.ndarray
    width: float
    chin: float
    eye_x: float
    mouth_x: float
    brow: float  # thickness, u
    fringe: float  # where the hair begins, u
    long_hair: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Person:
        skins = np.array(
            [(246, 214, 190), (236, 192, 160), (216, 166, 130), (188, 138, 104), (160, 112, 82)], float
        )
        hairs = np.array([(38, 28, 24), (84, 56, 36), (178, 138, 84), (132, 66, 38), (146, 144, 142)], float)
        irises = np.array([(70, 44, 26), (60, 96, 140), (70, 110, 70), (100, 100, 100)], float)
        at = rng.uniform(0, len(skins) - 1.001)
        skin = skins[int(at)] + (at % 1) * (skins[int(at) + 1] - skins[int(at)]) + rng.uniform(-5, 5, 3)
        return cls(
            skin=skin,
            hair=hairs[rng.integers(len(hairs))] * rng.uniform(0.8, 1.15),
            lips=skin * (0.80, 0.52, 0.52) * rng.uniform(0.9, 1.02),
            iris=irises[rng.integers(len(irises))] * rng.uniform(0.8, 1.2),
            shirt=rng.uniform(30, 220, 3),
            width=rng.uniform(0.95, 1.06),
            chin=rng.uniform(76.0, 84.0),
            eye_x=rng.uniform(26.5, 29.5),
            mouth_x=rng.uniform(22.0, 25.0),
            brow=rng.uniform(2.6, 4.4),
            fringe=rng.uniform(-70.0, -60.0),
            long_hair=bool(rng.random() < 0.5),
        )


class Puppet:
    """A person's sprites, (rows, columns, 4) premultiplied: the still parts painted once, the moving ones on a copy."""

    def __init__(self, person: Person) -> None:
        self.person = person
        self._image = np.zeros((*SPRITE, 4), np.float32)
        self._body()
        body = self._image.copy()
        self._paint(_oval(0, -8, 66 * person.width, 90), person.hair, opaque=True)
        for x in np.linspace(-45, 45, 7):
            self._paint(_oval(x, -10, 3, 75), person.hair * 0.75, soft=3, amount=0.6)
        turned, self._image = self._image, body
        self._head()
        self._still_features()
        still = self._image
        self._bases = {0: still.astype(np.uint8)}
        for sign, colour in ((1, (226, 28, 44)), (-1, (104, 196, 200))):
            self._image = still.copy()
            for x in (-35, 35):
                self._paint(_oval(x, 17, 17, 15), np.array(colour, float), soft=4, amount=0.85)
            self._bases[sign] = self._image.astype(np.uint8)
        self._image = still
        self._eyes = [self._open_eye(side) for side in (-1, 1)]
        self._paint(_box(0, 0, 74, 100), 255 - person.shirt, opaque=True)
        self._paint(_box(0, 0, 62, 88), 235 - person.shirt * 0.8)
        self.hidden = {TURNED: turned.astype(np.uint8), COVERED: self._image.astype(np.uint8)}

    def landmarks(self) -> np.ndarray:
        """(5, 2) in u: left eye, right eye, nose, mouth corners, as seen; still in the face whatever it shows.

        They lie where MTCNN puts them, in the median up to 1.5 u beside what is drawn, so that crops made by
        these points and crops made by the detector's are the same.
        """
        p, y = self.person, MOUTH_Y
        drawn = [(-p.eye_x, EYE_Y), (p.eye_x, EYE_Y), (0, 12), (-p.mouth_x, y), (p.mouth_x, y)]
        return np.add(drawn, [(1.2, -0.3), (0.0, -0.2), (0.2, 0.3), (1.4, 0.4), (-0.7, 0.4)])

    def sprite(self, valence: float, arousal: float, mouth: float, blink: bool, flush: int) -> np.ndarray:
        """The face: mouth curvature and brow slant by `valence`, eye openness and brow height by `arousal`."""
        image = self._bases[flush].copy()
        for side, eye in zip((-1, 1), self._eyes, strict=True):
            self._brow(image, side, valence, arousal)
            self._eye(image, side, eye, 0.0 if blink else 6.3 + 4.2 * arousal)
        self._mouth(image, 9.0 * valence, 11.0 * mouth)
        return image

    def _paint(
        self, points: np.ndarray, colour: np.ndarray, soft: float = 0, amount: float = 1, opaque: bool = False
    ) -> None:
        """A polygon (K, 2) in u over what is there; only where something is there already unless `opaque`."""
        import cv2

        mask = np.zeros(SPRITE, np.uint8)
        cv2.fillPoly(mask, [_fixed(points)], 255, cv2.LINE_AA, 4)
        cover = mask.astype(np.float32) * np.float32(amount / 255)
        if soft:
            cv2.GaussianBlur(cover, (0, 0), soft * DENSITY, dst=cover)
        old = self._image[..., 3:] / 255
        new = np.ones_like(old) if opaque else old
        colour4 = np.append(colour, 255).astype(np.float32)
        self._image += (colour4 * new - self._image) * cover[..., None]
        np.clip(self._image, 0, 255, out=self._image)

    def _body(self) -> None:
        p = self.person
        if p.long_hair:
            self._paint(_oval(0, 5, 74 * p.width, 100), p.hair * 0.85, opaque=True)
        self._paint(_oval(0, 200, 120, 98), p.shirt, opaque=True)
        self._paint(_oval(0, 78, 34, 48), p.skin * 0.82, opaque=True)
        self._paint(_oval(0, 74, 40, 26), p.skin * 0.55, soft=8, amount=0.7)  # the chin's shadow

    def _head(self) -> None:
        p = self.person
        for x in (-62, 62):
            self._paint(_oval(x * p.width, -4, 9, 17), p.skin * 0.9, opaque=True)
            self._paint(_oval(x * p.width, -3, 4, 10), p.skin * 0.65, soft=2)
        self._paint(_oval(0, -18, 65 * p.width, 76), p.hair, opaque=True)
        face = _oval(0, 0, 61 * p.width, p.chin)
        face[:, 0] *= 1 - 0.16 * np.clip(face[:, 1] / p.chin, 0, 1) ** 2  # narrower at the jaw
        self._paint(face, p.skin * 0.80, opaque=True)
        self._paint(face * (0.84, 0.88) + (0, -3), p.skin, soft=8)
        self._paint(_oval(0, -46, 30, 14), np.minimum(p.skin * 1.1, 255), soft=8, amount=0.6)
        t = np.linspace(-1, 1, 33)
        line = np.stack([62 * p.width * t, p.fringe + 34 * np.abs(t) ** 3.0], 1)
        crown = np.stack(
            [66 * p.width * np.cos(np.pi * (1 - t) / 2), -18 - 78 * np.sin(np.pi * (1 - t) / 2)], 1
        )
        self._paint(np.concatenate([line, crown[::-1]]), p.hair, soft=0.8)
        self._paint(_oval(-14, -84, 26, 5), np.minimum(p.hair * 1.35, 255), soft=4, amount=0.6)

    def _still_features(self) -> None:
        p = self.person
        for side in (-1, 1):
            self._paint(_oval(side * p.eye_x, EYE_Y - 1, 18, 12), p.skin * 0.70, soft=5, amount=0.75)
            self._paint(_oval(side * 7.5, 2, 3, 18), p.skin * 0.74, soft=2.5, amount=0.65)
            self._paint(_oval(side * 10.5, 13, 5, 5.5), p.skin * 0.78, soft=1.5, amount=0.8)
            self._paint(_oval(side * 33, 14, 13, 11), p.skin * (1.02, 0.93, 0.92), soft=6, amount=0.8)
        self._paint(_oval(0, 19.5, 13, 4), p.skin * 0.6, soft=2, amount=0.8)  # under the nose
        self._paint(_oval(0, -4, 3.5, 20), np.minimum(p.skin * 1.14, 255), soft=2.5, amount=0.8)
        self._paint(_oval(0, 10, 6, 5), np.minimum(p.skin * 1.12, 255), soft=2.5, amount=0.9)
        for side in (-1, 1):
            self._paint(_oval(side * 6, 17.5, 3.6, 2.2), p.skin * 0.28, soft=0.7)
        self._paint(_oval(0, 63, 14, 4), p.skin * 0.75, soft=4, amount=0.6)

    def _open_eye(self, side: int) -> np.ndarray:
        """The ball of an eye, to be seen through the lids."""
        x = side * self.person.eye_x
        self._paint(_oval(x, EYE_Y, 20, 16), np.array((240.0, 238.0, 234.0)))
        self._paint(_oval(x, EYE_Y - 12, 20, 6), np.array((120.0, 110.0, 105.0)), soft=3, amount=0.5)
        self._paint(_oval(x, EYE_Y, 7.6, 7.6), self.person.iris * 0.55)
        self._paint(_oval(x, EYE_Y, 6.4, 6.4), self.person.iris)
        self._paint(_oval(x, EYE_Y, 3.4, 3.4), np.array((8.0, 8.0, 10.0)))
        self._paint(_oval(x - 2.2, EYE_Y - 2.6, 1.5, 1.5), np.array((255.0, 255.0, 255.0)))
        return self._image[_around(x, EYE_Y)].astype(np.uint8)

    def _eye(self, image: np.ndarray, side: int, ball: np.ndarray, height: float) -> None:
        import cv2

        x, t = side * self.person.eye_x, np.linspace(-1, 1, 15)
        bow = 1 - np.abs(t) ** 2.2
        upper = np.stack([x + 14.5 * t, EYE_Y - height * bow], 1)
        lower = np.stack([x + 14.5 * t, EYE_Y + (0.6 * height + 1.0) * bow], 1)
        if height > 0:
            mask = np.zeros(SPRITE, np.uint8)
            cv2.fillPoly(mask, [_fixed(np.concatenate([upper, lower[::-1]]))], 255, cv2.LINE_AA, 4)
            where = _around(x, EYE_Y)
            cover = mask[where][..., None] * np.float32(1 / 255)
            patch = image[where]
            patch[:] = patch + (ball - patch.astype(np.float32)) * cover
        dark = self.person.skin * 0.22
        line = upper if height > 0 else lower
        cv2.polylines(image, [_fixed(line)], False, (*dark, 255), 3, cv2.LINE_AA, 4)
        crease = _fixed(upper * (1, 1) - (0, 4.5))[3:-3]
        cv2.polylines(image, [crease], False, (*self.person.skin * 0.62, 255), 1, cv2.LINE_AA, 4)

    def _brow(self, image: np.ndarray, side: int, valence: float, arousal: float) -> None:
        import cv2

        t = np.linspace(0, 1, 9)  # from the inner end to the outer
        x = side * (self.person.eye_x - 17 + 35 * t)
        y = EYE_Y - 19 - 5.5 * arousal - 6.5 * valence * (1 - 1.5 * t) - 5 * np.sin(np.pi * t**1.3)
        half = self.person.brow * (1 - 0.65 * t)
        outline = np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])
        colour = np.minimum(self.person.hair * 0.8, self.person.skin * 0.42)
        cv2.fillPoly(image, [_fixed(outline)], (*colour, 255), cv2.LINE_AA, 4)

    def _mouth(self, image: np.ndarray, curve: float, gap: float) -> None:
        """Corners stay where they are, so that aligning a face by them hides nothing; the middle moves."""
        import cv2

        t = np.linspace(-1, 1, 25)
        x, bow, half = self.person.mouth_x * t, 1 - t**2, 0.35 * gap
        middle = MOUTH_Y + curve * bow
        top = middle - half * bow - 5.5 * (1 - np.abs(t) ** 1.6) + 1.6 * np.exp(-((t / 0.18) ** 2))
        bottom = middle + (gap - half) * bow + 7.5 * bow**0.8
        inner_top, inner_bottom = middle - half * bow, middle + (gap - half) * bow

        def band(upper: np.ndarray, lower: np.ndarray, colour: np.ndarray) -> None:
            points = np.concatenate([np.stack([x, upper], 1), np.stack([x, lower], 1)[::-1]])
            cv2.fillPoly(image, [_fixed(points)], (*colour, 255), cv2.LINE_AA, 4)

        band(top, bottom, self.person.lips)
        band(inner_bottom + 2.2 * bow, inner_bottom + 4.6 * bow, np.minimum(self.person.lips * 1.12, 255))
        if gap > 1.5:
            band(inner_top, inner_bottom, np.array((52.0, 16.0, 20.0)))
            band(inner_top, inner_top + min(0.45 * gap, 3.5) * bow, np.array((236.0, 232.0, 222.0)))
        line = _fixed(np.stack([x, inner_top], 1))
        cv2.polylines(image, [line], False, (*self.person.lips * 0.4, 255), 2, cv2.LINE_AA, 4)


def _oval(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + half_width * np.cos(turn), y + half_height * np.sin(turn)], 1)


def _box(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    return np.array([x, y]) + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (half_width, half_height)


def _fixed(points: np.ndarray) -> np.ndarray:
    """Points in u as cv2's sixteenths of a sprite pixel."""
    return np.rint((points * DENSITY + ORIGIN) * 16).astype(np.int32)


def _around(x: float, y: float) -> tuple[slice, slice]:
    """The sprite's pixels around an eye."""
    column, row = (np.array([x, y]) * DENSITY + ORIGIN).astype(int)
    return slice(row - 18, row + 19), slice(column - 24, column + 25)


@dataclass
class Scene:
    """What is around the puppet, and how the head moves before it."""

    background: np.ndarray  # (256, 256, 3) uint8
    light: np.ndarray  # (256, 256, 3) float32
    gain: np.ndarray  # (T,)
    noise: np.ndarray  # (4, 256, 256, 3) int16
    pose: np.ndarray  # (T, 2, 3) from u to pixels
    blink: np.ndarray  # (T,) bool

    @classmethod
    def draw(cls, rng: np.random.Generator, frames: int, rate_hz: float) -> Scene:
        import cv2

        coarse = rng.uniform(60, 200) + rng.uniform(-40, 40, 3) + rng.uniform(-30, 30, (5, 5, 3))
        background = cv2.resize(
            np.clip(coarse, 0, 255).astype(np.uint8), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC
        )
        y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
        turn = rng.uniform(0, 2 * np.pi)
        tilt = 1 + rng.uniform(0.0, 0.22) * (np.cos(turn) * x + np.sin(turn) * y)
        light = (tilt[..., None] * rng.uniform(0.96, 1.04, 3)).astype(np.float32)
        walks = [walk(rng, frames, rate_hz, 4.0) for _ in range(5)]
        roll = np.deg2rad(np.clip(rng.normal(0, 3) + 4.5 * walks[0], -12, 12))
        scale = np.clip(rng.uniform(0.9, 1.04) + 0.04 * walks[1], 0.85, 1.1)
        centre = np.stack([128 + np.clip(7 * walks[2], -16, 16), 124 + np.clip(4 * walks[3], -9, 9)], 1)
        cos, sin = scale * np.cos(roll), scale * np.sin(roll)
        pose = np.stack([np.stack([cos, -sin, centre[:, 0]], 1), np.stack([sin, cos, centre[:, 1]], 1)], 1)
        noise = np.rint(rng.normal(0, rng.uniform(1.5, 4.0), (4, SIZE, SIZE, 3))).astype(np.int16)
        blink = rng.random(frames) < 0.25 / rate_hz
        gain = np.clip(rng.uniform(0.9, 1.08) + 0.04 * walks[4], 0.8, 1.15)
        return cls(background, light, gain, noise, pose, blink)

    def frame(self, i: int, sprite: np.ndarray | None) -> np.ndarray:
        """(256, 256, 3) uint8: the sprite before the background, lit, blurred and noisy."""
        import cv2

        image = self.background
        if sprite is not None:
            pose = self.pose[i] / DENSITY
            pose[:, 2] = self.pose[i][:, 2] - pose[:, :2] @ ORIGIN
            front = cv2.warpAffine(sprite, pose, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
            clear = cv2.cvtColor(255 - front[..., 3], cv2.COLOR_GRAY2RGB)
            image = cv2.add(cv2.multiply(image, clear, scale=1 / 255), front[..., :3])
        image = cv2.multiply(image, self.light, scale=self.gain[i], dtype=cv2.CV_8U)
        image = cv2.GaussianBlur(image, (3, 3), 0.7)
        return cv2.add(image, self.noise[i % len(self.noise)], dtype=cv2.CV_8U)


def walk(rng: np.random.Generator, frames: int, rate_hz: float, scale_s: float) -> np.ndarray:
    """(frames,) an Ornstein-Uhlenbeck walk of variance 1 and time scale `scale_s`, smoothed over a fifth of it."""
    lag_s = np.arange(0, 6 * scale_s, 1 / rate_hz)
    kernel = np.exp(-lag_s / scale_s) - np.exp(-lag_s / (scale_s / 5))
    kernel /= np.linalg.norm(kernel)
    return np.convolve(rng.standard_normal(frames + len(kernel) - 1), kernel, "valid")
