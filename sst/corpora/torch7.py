"""Tensors in files of Torch7 (.t7), and nothing else that such a file can hold.

A file is one object in the binary format of `torch.save`: the type number of a Torch object (int32 4), its index
(int32), a version (int32 length, text "V 1"), its class (the same), and its content. A tensor's content is the number
of dimensions (int32), sizes and strides (int64 each), the storage's offset counted from 1 (int64), and a storage: a
Torch object again, with a number of elements (int64) and these. All little-endian, as written on x86.
"""

import struct

import numpy as np

MAX_BYTES = 1_000_000
_TORCH_OBJECT = 4
_TYPES = {"torch.FloatTensor": "<f4", "torch.DoubleTensor": "<f8"}


def parse_tensor(data: bytes) -> np.ndarray:
    """The float or double tensor that is the whole content of a file.

    Args:
        data: the file, at most `MAX_BYTES`.

    Returns:
        float64, of the tensor's shape.

    Raises:
        ValueError: if it is anything else, or cut short.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes; a tensor of points has fewer than {MAX_BYTES}")
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if not 0 <= count <= len(data) - position:
            raise ValueError(f"cut short or not a Torch7 file: {count} bytes expected at byte {position}")
        position += count
        return data[position - count : position]

    def numbers(code: str, count: int) -> tuple[int, ...]:
        layout = f"<{count}{code}"
        return struct.unpack(layout, take(struct.calcsize(layout)))

    def text() -> str:
        return take(numbers("i", 1)[0]).decode("ascii", "replace")

    def begin(expected: str) -> str:
        kind, _ = numbers("i", 2)
        if kind != _TORCH_OBJECT or text() != "V 1":
            raise ValueError(f"expected {expected}, found an object of another kind")
        return text()

    tensor = begin("a tensor")
    if tensor not in _TYPES:
        raise ValueError(f"expected a tensor of floats or doubles, found {tensor[:40]!r}")
    dimensions = numbers("i", 1)[0]
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{dimensions} dimensions; 1 to 4 are expected")
    sizes, strides = numbers("q", dimensions), numbers("q", dimensions)
    offset = numbers("q", 1)[0] - 1
    if (storage := begin("a storage")) != tensor.replace("Tensor", "Storage"):
        raise ValueError(f"expected the storage of a {tensor}, found {storage[:40]!r}")
    count = numbers("q", 1)[0]
    item = np.dtype(_TYPES[tensor])
    values = np.frombuffer(take(min(count, MAX_BYTES) * item.itemsize), item)
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes follow the tensor")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min(sizes) < 1 or min(strides) < 0 or offset < 0 or last >= count or np.prod(sizes, dtype=float) > MAX_BYTES:
        raise ValueError(f"a tensor of sizes {sizes} does not fit its storage of {count} elements")
    places = np.full((1,) * dimensions, offset)
    for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        shape = [size if other == axis else 1 for other in range(dimensions)]
        places = places + (np.arange(size) * stride).reshape(shape)
    tensor_values: np.ndarray = values[places].astype(np.float64)
    return tensor_values
