"""Graphs that keep images apart, in the forms that exporters write at each opset."""

from proof_cases.graphs import KERNEL, NORM, SCALES, Case, tensor

GATE = """<opset_import: ["": 17], domain: "local">
          gate<k>(a) => (b) { c = Softmax<axis: int = @k>(a)  b = Mul(a, c) }"""

CASES = {
    "a network of Keras through tf2onnx": Case(
        """t = Transpose<perm = [0, 3, 1, 2]>(x)  p = Pad(t, pads)  c = Conv(p, k)
           n = BatchNormalization(c, s, b, m, v)  low = Max(n, zero)  r = Min(low, six)
           d = Transpose<perm = [0, 2, 3, 1]>(r)  g = ReduceMean<axes = [1, 2], keepdims = 0>(d)
           shape = Shape(g)  h = Cast<to = 6>(shape)  f = Slice(h, i0, i1, i0)  w = Cast<to = 7>(f)
           e = Concat<axis = 0>(w, rest)  q = Reshape(g, e)  l = MatMul(q, head)  o = Add(l, bias)
           y = Softmax<axis = -1>(o)""",
        constants=NORM
        + """, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, float zero = {0}, float six = {6},
               int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] rest = {4}, float[3] bias = {1, 2, 3}, """
        + tensor("k", 4, 4, 3, 3)
        + ", "
        + tensor("head", 4, 3),
        opsets=(11, 13, 17),
    ),
    "BatchNormalization at inference": Case(
        "y = BatchNormalization(x, s, b, m, v)",
        constants=NORM,
        opsets=(9, 13, 15, 20, 23),
    ),
    "Dropout at inference": Case("y = Dropout(x)", opsets=(9, 12, 20)),
    "Dropout told not to train": Case(
        "y = Dropout(x, r, no)",
        constants="float r = {0.5}, bool no = {0}",
        opsets=(13, 22),
    ),
    "Conv, Relu, MaxPool, AveragePool": Case(
        """c = Conv(x, w)  r = Relu(c)  p = MaxPool<kernel_shape = [2, 2], ceil_mode = 1>(r)
           y = AveragePool<kernel_shape = [2, 2], pads = [1, 1, 1, 1]>(p)""",
        constants=KERNEL,
        opsets=(11, 17, 22),
    ),
    "ConvTranspose": Case(
        "t = Relu(x)  y = ConvTranspose<strides = [2, 2]>(t, w)",
        constants="float[4, 2, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}",
        opsets=(11, 22),
    ),
    "Clip by attributes": Case("y = Clip<min = 0.0, max = 6.0>(x)", opsets=(9,)),
    "Clip by inputs": Case(
        "y = Clip(x, lo, hi)",
        constants="float lo = {0}, float hi = {6}",
        opsets=(11, 20),
    ),
    "hard activations": Case("h = HardSigmoid(x)  m = Mul(x, h)  y = LeakyRelu(m)", opsets=(9, 22)),
    "the flatten of the old exporter": Case(
        """s = Shape(x)  n = Gather(s, zero)  u = Unsqueeze<axes = [0]>(n)
           t = Concat<axis = 0>(u, rest)  y = Reshape(x, t)""",
        constants="int64 zero = {0}, int64[1] rest = {-1}",
        opsets=(9, 11),
    ),
    "the flatten of TensorFlow": Case(
        """s = Shape(x)  c = Cast<to = 6>(s)  n = Slice(c, zero, one, zero)  l = Cast<to = 7>(n)
           tail = Slice(s, one, four, zero)  p = ReduceProd<keepdims = 1>(tail)
           t = Concat<axis = 0>(l, p)  y = Reshape(x, t)""",
        constants="int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4}",
        opsets=(11, 17),
    ),
    "Flatten and Gemm": Case(
        "f = Flatten(x)  y = Gemm<transB = 1>(f, w, c)",
        constants=tensor("w", 2, 64) + ", float[2] c = {1, 2}",
        opsets=(9, 13),
    ),
    "the batch axis sized by what is left": Case(
        "y = Reshape(x, t)",
        constants="int64[2] t = {-1, 64}",
        opsets=(9, 21),
    ),
    "the batch axis copied": Case("y = Reshape(x, t)", constants="int64[2] t = {0, -1}", opsets=(9, 21)),
    "a channel shuffle of known sizes": Case(
        "a = Reshape(x, t)  b = Transpose<perm = [0, 2, 1, 3, 4]>(a)  y = Reshape(b, u)",
        constants="int64[5] t = {-1, 2, 2, 4, 4}, int64[4] u = {-1, 4, 4, 4}",
        opsets=(9, 20),
    ),
    "a channel shuffle by shape arithmetic": Case(
        """s = Shape(x)  n = Gather(s, i0)  c = Gather(s, i1)  d = Div(c, two)  h = Gather(s, i2)
           w = Gather(s, i3)  n1 = Unsqueeze(n, v)  d1 = Unsqueeze(d, v)  h1 = Unsqueeze(h, v)
           w1 = Unsqueeze(w, v)  c1 = Unsqueeze(c, v)  t = Concat<axis = 0>(n1, g, d1, h1, w1)
           a = Reshape(x, t)  b = Transpose<perm = [0, 2, 1, 3, 4]>(a)
           u = Concat<axis = 0>(n1, c1, h1, w1)  y = Reshape(b, u)""",
        constants="""int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64 i3 = {3}, int64 two = {2},
           int64[1] g = {2}, int64[1] v = {0}""",
        opsets=(13, 17),
    ),
    "channels folded into the batch and back": Case(
        "a = Reshape(x, t)  r = Softmax<axis = 2>(a)  y = Reshape(r, u)",
        constants="int64[4] t = {-1, 1, 4, 4}, int64[4] u = {-1, 4, 4, 4}",
    ),
    "channels before the batch, merged and parted": Case(
        """t = Transpose<perm = [1, 0, 2, 3]>(x)  a = Reshape(t, m)  p = MatMul(a, w)
           b = Reshape(p, q)  y = Transpose<perm = [1, 0, 2, 3]>(b)""",
        constants=tensor("w", 16, 16) + ", int64[2] m = {-1, 16}, int64[4] q = {4, -1, 4, 4}",
    ),
    "a class token expanded to the batch": Case(
        """s = Shape<start = 0, end = 1>(x)  t = Concat<axis = 0>(s, rest)  e = Expand(token, t)
           y = Concat<axis = 1>(e, x)""",
        constants="int64[3] rest = {1, 4, 4}, float[1, 1, 1, 4] token = {1, 2, 3, 4}",
    ),
    "expanding by -1, as torch writes it": Case(
        """s = Shape(x)  n = Gather(s, zero)  u = Unsqueeze(n, axes)
           want = Concat<axis = 0>(u, keep, keep, keep)
           ones = ConstantOfShape<value = int64[1] {1}>(four)  minus = Equal(want, mone)
           t = Where(minus, ones, want)  e = Expand(c, t)  y = Add(x, e)""",
        constants="""int64 zero = {0}, int64[1] axes = {0}, int64[1] keep = {-1}, int64[1] four = {4},
           int64 mone = {-1}, float[1, 4, 1, 1] c = {1, 2, 3, 4}""",
    ),
    "zeros of the batch's size": Case(
        "s = Shape(x)  z = ConstantOfShape<value = float[1] {2}>(s)  y = Mul(x, z)",
        opsets=(9, 20),
    ),
    "a tiled constant": Case(
        "s = Shape<end = 1>(x)  r = Concat<axis = 0>(s, ones)  c = Tile(w, r)  y = Add(x, c)",
        constants="int64[3] ones = {1, 4, 4}, float[1, 4, 1, 1] w = {1, 2, 3, 4}",
    ),
    "squeeze and excitation": Case(
        """g = GlobalAveragePool(x)  c = Conv(g, w)  r = Relu(c)  d = Conv(r, k)  h = HardSigmoid(d)
           y = Mul(x, h)""",
        constants=KERNEL + ", float[4, 2, 1, 1] k = {1, 2, 3, 4, 5, 6, 7, 8}",
        opsets=(9, 20),
    ),
    "means by attribute": Case("a = ReduceMean<axes = [2, 3], keepdims = 0>(x)  y = Relu(a)", opsets=(9, 13)),
    "means by input": Case(
        "a = ReduceMean<keepdims = 0>(x, i)  y = Relu(a)",
        constants="int64[2] i = {-1, -2}",
        opsets=(18, 20),
    ),
    "no axes, no reduction": Case("y = ReduceSum<noop_with_empty_axes = 1>(x)", opsets=(13,)),
    "Squeeze and Unsqueeze by attribute": Case(
        "a = Unsqueeze<axes = [1, 5]>(x)  y = Squeeze<axes = [1]>(a)",
        opsets=(9, 11),
    ),
    "Squeeze and Unsqueeze by input": Case(
        "a = Unsqueeze(x, i)  y = Squeeze(a, j)",
        constants="int64[2] i = {1, 5}, int64[1] j = {-1}",
        opsets=(13, 20),
    ),
    "Slice by attribute": Case("y = Slice<axes = [1, 2], starts = [0, 1], ends = [2, 1000]>(x)", opsets=(9,)),
    "Slice by input, the whole batch among them": Case(
        "y = Slice(x, i, j, k, l)",
        constants="""int64[3] i = {0, 1, -1}, int64[3] j = {9223372036854775807, 3, -100},
           int64[3] k = {0, 1, 2}, int64[3] l = {1, 1, -1}""",
        opsets=(10, 20),
    ),
    "Split": Case("a, b = Split<axis = 1>(x)  y = Concat<axis = 1>(b, a)", opsets=(9, 13)),
    "Split by sizes": Case(
        "a, b = Split<axis = 1>(x, i)  y = Concat<axis = 1>(b, a)",
        constants="int64[2] i = {1, 3}",
        opsets=(13, 18),
    ),
    "Pad by attribute": Case("y = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1]>(x)", opsets=(9,)),
    "Pad by input": Case("y = Pad(x, i)", constants="int64[8] i = {0, 1, 1, 1, 0, 0, 1, 1}", opsets=(11, 19)),
    "Softmax over what follows the channels": Case("y = Softmax<axis = 1>(x)", opsets=(9, 11)),
    "Softmax over the channels": Case("y = Softmax<axis = 1>(x)", opsets=(13, 20)),
    "LayerNormalization": Case("y = LayerNormalization<axis = -1>(x, s, b)", constants=NORM, opsets=(17, 20)),
    "a layer norm written out": Case(
        """m = ReduceMean<axes = [-1]>(x)  d = Sub(x, m)  q = Pow(d, two)
           v = ReduceMean<axes = [-1]>(q)  e = Add(v, eps)  r = Sqrt(e)  y = Div(d, r)""",
        constants="float two = {2}, float eps = {0.001}",
        opsets=(9, 13),
    ),
    "InstanceNormalization and LRN": Case(
        "a = InstanceNormalization(x, s, b)  y = LRN<size = 3>(a)",
        constants=NORM,
        opsets=(9, 20),
    ),
    "GroupNormalization": Case(
        "y = GroupNormalization<num_groups = 2>(x, s, b)",
        constants=NORM,
        opsets=(21,),
    ),
    "Resize by scales": Case(
        'y = Upsample<mode = "nearest">(x, i)',
        constants="float[4] i = {1, 1, 2, 2}",
        opsets=(9,),
    ),
    "Resize by sizes": Case(
        "s = Shape(x)  n = Slice(s, i, j, i)  t = Concat<axis = 0>(n, k)  y = Resize(x, , , t)",
        constants="int64[1] i = {0}, int64[1] j = {2}, int64[2] k = {7, 7}",
        opsets=(13, 19),
    ),
    "CumSum, TopK, ArgMax within an image": Case(
        "c = CumSum(x, i)  t, p = TopK<axis = 1>(c, k)  b = ArgMax<axis = -1>(t)  y = Cast<to = 1>(b)",
        constants="int64 i = {2}, int64[1] k = {2}",
        opsets=(11, 20),
    ),
    "attention within an image": Case(
        """q = Reshape(x, i)  t = Transpose<perm = [0, 2, 1]>(q)  a = MatMul(q, t)
           s = Softmax<axis = -1>(a)  y = MatMul(s, q)""",
        constants="int64[3] i = {-1, 4, 16}",
    ),
    "an Attention operator": Case("y = Attention(x, x, x)", opsets=(23,)),
    "Einsum within an image": Case(
        'y = Einsum<equation = "nchw,ck->nkhw">(x, w)',
        constants="float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}",
    ),
    "static quantization by operators": Case(
        """q = QuantizeLinear(x, a, z)  c = QLinearConv(q, a, z, w, e, f, a, z)
           y = DequantizeLinear(c, a, z)""",
        constants=SCALES + ", uint8[2, 4, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}",
        opsets=(10, 13, 21),
    ),
    "static quantization in ONNX Runtime's form": Case(
        """q = QuantizeLinear(x, a, z)  s = com.microsoft.QLinearAdd(q, a, z, q, a, z, a, z)
           g = com.microsoft.QLinearGlobalAveragePool<channels_last = 0>(s, a, z, a, z)
           y = DequantizeLinear(g, a, z)""",
        constants=SCALES,
        opsets=(13, 17),
    ),
    "integer operators with static scales": Case(
        """q = QuantizeLinear(x, a, z)  c = ConvInteger(q, w, z)  r = Reshape(c, i)
           g = Cast<to = 1>(r)  y = Mul(g, a)""",
        constants=SCALES + ", uint8[1, 4, 1, 1] w = {1, 2, 3, 4}, int64[2] i = {0, -1}",
        opsets=(10, 17),
    ),
    "integer matrix product": Case(
        "q = QuantizeLinear(x, a, z)  c = MatMulInteger(q, w, z)  y = Cast<to = 1>(c)",
        constants=SCALES + ", uint8[4, 1] w = {1, 2, 3, 4}",
        opsets=(10, 17),
    ),
    "quantized weights": Case(
        "w = DequantizeLinear<axis = 0>(k, e, f)  y = Conv(x, w)",
        constants=SCALES + ", uint8[2, 4, 1, 1] k = {1, 2, 3, 4, 5, 6, 7, 8}",
        opsets=(13, 20),
    ),
    "If on a constant": Case(
        """y = If (c) <then_branch = t () => (float p) { p = Relu(x) },
           else_branch = e () => (float q) { q = ReduceMean(x) }>""",
        constants="bool c = {1}",
    ),
    "If on a number of channels": Case(
        """s = Shape(x)  c = Gather(s, i)  e = Equal(c, j)
           y = If (e) <then_branch = t () => (float p) { p = Softmax<axis = 0>(x) },
           else_branch = f () => (float q) { q = Identity(x) }>""",
        constants="int64 i = {1}, int64 j = {1}",
        opsets=(11, 17),
    ),
    "a Loop of a known number of turns": Case(
        """y = Loop (n, yes, x) <body = b (int64 i, bool c, float[A,B,C,D] a) => (bool d, float e)
           { d = Identity(c)  e = Softmax(a) }>""",
        constants="int64 n = {3}, bool yes = {1}",
    ),
    "a local function with an attribute": Case("y = local.gate<k = 1>(x)", functions=GATE),
    "addresses of an image's own elements": Case(
        """s = Shape<end = 1>(x)  n = Squeeze(s)  r = Range(zero, n, one)  stride = Mul(r, row)
           u = Unsqueeze(stride, axes)  address = Add(u, offsets)  flat = Reshape(x, all)
           y = Gather<axis = 0>(flat, address)""",
        constants="""int64 zero = {0}, int64 one = {1}, int64 row = {64}, int64[1] all = {-1},
           int64[1] axes = {1}, int64[1, 4] offsets = {63, 0, 7, 9}""",
    ),
    "adaptive pooling by GatherND": Case(
        """t = Transpose<perm = [2, 3, 0, 1]>(x)  g = GatherND(t, i)
           y = Transpose<perm = [1, 2, 0]>(g)""",
        constants="int64[3, 2] i = {0, 0, 1, 1, 3, 3}",
    ),
    "a fixed batch size that nothing relies on": Case("y = Relu(x)", images="float[1,4,4,4] x", runs=False),
    "heights and widths left open": Case(
        """w = ConstantOfShape<value = float[1] {1}>(k)  c = Conv(x, w)  s = Shape(c)  n = Gather(s, i)
           u = Unsqueeze(n, j)  t = Concat<axis = 0>(u, m)  y = Reshape(c, t)""",
        constants="int64[4] k = {2, 4, 1, 1}, int64 i = {0}, int64[1] j = {0}, int64[2] m = {2, -1}",
        images="float[N,4,H,W] x",
    ),
}
