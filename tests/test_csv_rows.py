"""The CSV reader alone: what csv.writer wrote comes back; a broken row is found, and costs itself only."""

import csv
import logging
from pathlib import Path

import pytest

from training.readers import csv_rows
from training.readers.csv_rows import CsvForm, CsvRecords, line_number, open_csv


def write(tmp_path: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cells(path: Path, **options) -> list[list[str] | None]:
    return [row.cells for row in open_csv(path, **options).read()]


def fault(records: CsvRecords) -> list[tuple[str, str]]:
    """Returns the fault of each bad row, and the bytes of the row."""
    content = records.path.read_bytes().decode("utf-8", "replace")
    return [(row.fault, content[row.begin : row.end]) for row in records.read() if row.cells is None]


@pytest.mark.parametrize(("separator", "name"), [(",", "t.csv"), (";", "t.csv"), ("\t", "t.csv"), ("\t", "t.tsv")])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_pythons_writer_wrote_comes_back(tmp_path, separator, name, quoting, caplog):
    rows = [
        ["a.jpg", 'He said "hi", and left; then\tnothing.'],
        ["b.jpg", "two\nlines"],
        ["c.jpg", ""],
        ["", ""],
        ["d e.jpg", "back\\slash and ünïcode"],
    ]
    with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, quoting=quoting).writerows([["image", "caption"], *rows])
    assert cells(tmp_path / name) == rows
    named = f"separated by {separator!r}, by its first line; --csv-separator names another one"
    assert (named in caplog.text) == (separator != "," and name == "t.csv")


def test_the_separator_of_a_name_is_not_guessed(tmp_path, caplog):
    path = write(tmp_path, "a,b\tc\n1,2\t3\n", "t.tsv")
    assert open_csv(path).names == ["a,b", "c"] and cells(path) == [["1,2", "3"]]
    assert open_csv(path, ",").names == ["a", "b\tc"] and not caplog.records


def test_the_header_is_stripped_and_named(tmp_path):
    path = write(tmp_path, '\ufeff image , "caption" \n1,2\n')
    assert open_csv(path).names == ["image", "caption"]
    latin = write(tmp_path, "image,größe\n1,2\n".encode("cp1252"), "latin.csv")
    assert open_csv(latin).names == ["image", "größe"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n".encode("utf-16-le"), "UTF-16 text; convert it first: iconv -f UTF-16 -t UTF-8"),
        ("a,b\n".encode("utf-16-be"), "UTF-16 text"),
        (b"\xff\xfea,b\n", "UTF-16 text"),
        (b"\xfe\xffa,b\n", "UTF-16 text"),
        (b"a,b\r1,2\r", "lines end with CR alone; convert them first"),
        (
            b"",
            "no header in its first row; is it a CSV with the separator ','.? Name another one with --csv-separator$",
        ),
        (b"a,b, a\n1,2,3\n", r"two columns are called 'a' \(the first line is the header\)"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"t.csv: {message}"):
        open_csv(write(tmp_path, content))


def test_lines_that_are_not_utf_8_are_read_as_windows_1252_and_said(tmp_path):
    path = write(tmp_path, b"image,caption\na.jpg,caf\xe9\nb.jpg,plain\nc.jpg,\x81 undefined\n")
    rows = list(open_csv(path).read())
    assert [row.cells for row in rows] == [["a.jpg", "café"], ["b.jpg", "plain"], ["c.jpg", "\ufffd undefined"]]
    assert [row.repaired for row in rows] == [True, False, True]


def test_nul_characters_are_left_out_and_a_bom_within_the_file_is_text(tmp_path):
    path = write(tmp_path, b"image,caption\na.jpg,a\0b\nb.jpg,\xef\xbb\xbfc\n")
    assert cells(path) == [["a.jpg", "ab"], ["b.jpg", "\ufeffc"]]


def test_blank_lines_are_no_rows_but_empty_cells_are(tmp_path):
    assert cells(write(tmp_path, "a,b\n\n1,2\n   \n,\n\n")) == [["1", "2"], ["", ""]]
    assert cells(write(tmp_path, "a\n\n1\n \n2\n")) == [["1"], ["2"]]  # a table of one column


def test_escaped_quotes_of_spark_are_read(tmp_path, caplog):
    path = write(tmp_path, 'image,caption\na.jpg,"say \\"hi\\", he said"\nb.jpg,"a back\\\\slash"\nc.jpg,"x, y"\n')
    assert cells(path) == [["a.jpg", 'say "hi", he said'], ["b.jpg", "a back\\slash"], ["c.jpg", "x, y"]]
    assert 'quotation marks are written as \\" and read as such' in caplog.text


def test_backslashes_are_plain_where_quotes_are_doubled(tmp_path, caplog):
    path = write(tmp_path, 'image,caption\na\\"b.jpg,x\nb.jpg,"say ""hi"", \\ he"\n')
    assert cells(path)[1] == ["b.jpg", 'say "hi", \\ he'] and "written as" not in caplog.text


def test_quotes_that_surround_no_cell_are_plain(tmp_path, caplog):
    path = write(tmp_path, 'image,caption\na.jpg,"hi" she said\nb.jpg,5" wide\n')
    assert cells(path) == [["a.jpg", '"hi" she said'], ["b.jpg", '5" wide']]
    assert "no cell is quoted as a whole, so quotation marks are read as plain characters" in caplog.text
    path = write(tmp_path, 'image,caption\na.jpg,"hi" she said\nb.jpg,"whole"\n')
    assert cells(path) == [None, ["b.jpg", "whole"]]


def test_only_the_first_bytes_decide_about_the_form(tmp_path):
    good, bad = "a.jpg,x\n" * 10, 'b.jpg,"hi" she said\n'
    path = write(tmp_path, f"image,caption\n{good}{bad}")
    assert open_csv(path, limit=40).form == CsvForm(",") and open_csv(path).form == CsvForm(",", quoted=False)


@pytest.mark.parametrize("line", ["c.jpg", "c.jpg,x,y"])
def test_a_row_with_another_number_of_cells_is_bad_alone(tmp_path, line):
    path = write(tmp_path, f"image,caption\na.jpg,x\n{line}\nb.jpg,y\n")
    number = line.count(",") + 1
    assert cells(path) == [["a.jpg", "x"], None, ["b.jpg", "y"]]
    assert fault(open_csv(path)) == [(f"{number} cells, the header has 2", f"{line}\n")]


SWALLOWS = "a quotation mark that is never closed, or a cell of several lines that look like rows"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a.jpg", "b.jpg"),
        ("a.JPG", "photo b.jpg"),  # a blank in the name: the same suffix counts
        ("https://x.org/1", "https://x.org/2"),
        ("img 12", "img 7"),  # the same form
        ("a dog", "cat"),  # no more words
    ],
)
def test_a_quote_that_is_never_closed_costs_its_own_row(tmp_path, first, second):
    """The quote before the last row's closes the cell, so the row would have two cells: one is three lines."""
    path = write(tmp_path, f'image,caption\n{first},"open\n{second},fine\n{first},"closed"\n{second},y\n')
    found = cells(path)
    assert found == [None, [second, "fine"], [first, "closed"], [second, "y"]]


@pytest.mark.parametrize(
    ("first", "line"),
    [
        ("a.jpg", "he came, he saw"),  # no name of an image
        ("a.jpg", "we have 3 cats, 2 dogs.jpeg and so on"),
        ("a.jpg", "the file b.png, here"),
        ("https://x.org/1", "b.jpg, fine"),
        ("img 12", "img b, fine"),
        ("dog", "a red cat, fine"),
        ("a.jpg", ", fine"),
    ],
)
def test_lines_of_a_caption_that_look_like_no_row_are_kept(tmp_path, first, line):
    path = write(tmp_path, f'image,caption\n{first},"a caption\n{line}\nits end"\nb.jpg,y\n')
    assert cells(path) == [[first, f"a caption\n{line}\nits end"], ["b.jpg", "y"]]


def test_a_line_of_a_tab_separated_caption_with_tabs_is_doubtful(tmp_path):
    content = 'image\tcaption\nx y.jpg\t"open\nsome words\tand more\nlast"\nb.jpg\tfine\n'
    path = write(tmp_path, content, "t.tsv")
    assert fault(open_csv(path))[0] == (SWALLOWS, 'x y.jpg\t"open\n')
    one = write(tmp_path, 'caption\n"two\nlines"\nthird\n', "one.tsv")  # one column: every line would be a row
    assert cells(one) == [["two\nlines"], ["third"]]


def test_reading_goes_on_at_the_first_line_that_looks_like_a_row(tmp_path):
    text = 'image,caption\na.jpg,"never closed\nnothing here\nb.jpg,"quoted, with a comma"\nc.jpg,z\n'
    assert cells(write(tmp_path, text)) == [None, ["b.jpg", "quoted, with a comma"], ["c.jpg", "z"]]
    assert fault(open_csv(write(tmp_path, text)))[0][1] == 'a.jpg,"never closed\nnothing here\n'


def test_a_row_without_an_end_is_cut_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_rows, "MAX_ROW_BYTES", 100)
    path = write(tmp_path, 'image,caption\na.jpg,"' + "word " * 50 + "\n" + "b.jpg,fine\n")
    rows = cells(path)
    assert rows[0] is None and rows[-1] == ["b.jpg", "fine"]


def test_rows_are_read_from_a_byte_to_a_byte(tmp_path):
    path = write(tmp_path, "a,b\n1,2\n3,4\n5,6\n")
    rows = list(open_csv(path).read())
    assert [(row.begin, row.end) for row in rows] == [(4, 8), (8, 12), (12, 16)]
    assert [row.cells for row in open_csv(path).read(8)] == [["3", "4"], ["5", "6"]]
    assert [row.cells for row in open_csv(path).read(end=9)] == [["1", "2"], ["3", "4"]]
    assert [line_number(path, position) for position in (0, 3, 4, 15, 16)] == [1, 1, 2, 4, 5]


def test_a_carriage_return_within_a_line_is_found(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    path = write(tmp_path, b"image,caption\na.jpg,one\rtwo\nb.jpg,y\n")
    assert fault(open_csv(path))[0][0].endswith("or a CR outside of quotes")
    assert cells(path)[-1] == ["b.jpg", "y"]
