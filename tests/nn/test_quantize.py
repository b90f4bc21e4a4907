import torch

from hcodec_core.nn.quantize import ResidualQuantizer


def brute_force(x, books):
    """Nearest entries of one vector, book after book, in float64."""
    residual, codes, margins = x.double(), [], []
    for book in books.double():
        distances = ((residual - book) ** 2).sum(dim=1)
        order = distances.argsort()
        codes.append(int(order[0]))
        margins.append(float((distances[order[1]] - distances[order[0]]) / distances[order[0]]))
        residual = residual - book[order[0]]
    return codes, margins


def test_codes_and_margins_are_those_of_a_full_search():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 3, 16).double()
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    found = quantizer.encode(x, with_margins=True)
    for row in range(2):
        for step in range(10):
            codes, margins = brute_force(x[row, :, step], quantizer.codebooks)
            assert found.codes[row, :, step].tolist() == codes
            expected = torch.tensor(margins, dtype=torch.float64)
            torch.testing.assert_close(found.margins[row, :, step], expected)


def test_decoding_sums_the_entries_of_the_given_books():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(4, 3, 8)
    codes = torch.randint(0, 8, (2, 3, 5))
    whole = quantizer.decode(codes)
    assert whole.shape == (2, 4, 5)
    expected = sum(quantizer.codebooks[q][codes[1, q, 2]] for q in range(3))
    torch.testing.assert_close(whole[1, :, 2], expected)
    torch.testing.assert_close(
        quantizer.decode(codes[:, :1])[0, :, 0], quantizer.codebooks[0][codes[0, 0, 0]]
    )


def test_vectors_are_what_the_codes_decode_to():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(4, 3, 8)
    found = quantizer.encode(torch.randn(1, 4, 7))
    torch.testing.assert_close(found.vectors, quantizer.decode(found.codes), atol=1e-5, rtol=1e-5)
    assert found.margins is None


def test_the_search_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 2, 64)
    x = torch.randn(1, 8, 200)
    plain = quantizer.encode(x).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(x).codes, plain)
