"""The best scale of the trellis codes for Gaussian weights, and the error that they leave.

GAUSSIAN[(L, rate)] = (scale, error): for x of unit variance, code values times scale approximate x when the encoder
gets x / scale; error is the mean squared error then (the power of the error relative to x). Found by a search over the
scale on Gaussian tiles; `pytest tests/test_native_encoder.py -k gaussian` measures both again.
"""

GAUSSIAN: dict[tuple[int, int], tuple[float, float]] = {
    (12, 1): (0.7911, 0.52814),  # -2.77 dB
    (12, 2): (0.9900, 0.27796),  # -5.56 dB
    (12, 3): (1.1119, 0.14640),  # -8.34 dB
    (12, 4): (1.1859, 0.07808),  # -11.07 dB
    (12, 5): (1.2591, 0.04287),  # -13.68 dB
    (12, 6): (0.8709, 0.01952),  # -17.09 dB
    (12, 7): (0.9249, 0.00530),  # -22.76 dB
    (14, 1): (0.7853, 0.52228),  # -2.82 dB
    (14, 2): (1.0030, 0.27190),  # -5.66 dB
    (14, 3): (1.1018, 0.14180),  # -8.48 dB
    (14, 4): (1.1904, 0.07569),  # -11.21 dB
    (14, 5): (1.2605, 0.04042),  # -13.93 dB
    (14, 6): (0.8642, 0.01833),  # -17.37 dB
    (14, 7): (0.8913, 0.00485),  # -23.14 dB
    (16, 1): (0.7801, 0.51977),  # -2.84 dB
    (16, 2): (1.0062, 0.26846),  # -5.71 dB
    (16, 3): (1.1043, 0.13885),  # -8.57 dB
    (16, 4): (1.1659, 0.07441),  # -11.28 dB
    (16, 5): (1.2387, 0.03919),  # -14.07 dB
    (16, 6): (0.8460, 0.01777),  # -17.50 dB
    (16, 7): (0.8807, 0.00464),  # -23.33 dB
}
