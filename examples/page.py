# SPDX-License-Identifier: Apache-2.0
"""An invoice, drawn: text in a few places and much empty paper, as scanned pages are."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw, ImageFont

TOKEN_PIXELS = 28  # Qwen2-VL: one visual token is a square of 28 x 28 pixels
GOODS = ("paper", "chairs", "table", "lamps", "window glass", "garden tools", "train tickets")


def invoice(number: int = 1, *, columns: int = 32, rows: int = 45) -> Image.Image:
    """A page of `columns` x `rows` visual tokens, at least 20 x 30; its text follows `number`."""
    if columns < 20 or rows < 30:
        raise ValueError(f"an invoice needs at least 20 x 30 tokens, got {columns} x {rows}")
    pick = random.Random(number)
    width, height = columns * TOKEN_PIXELS, rows * TOKEN_PIXELS
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    title, body = ImageFont.load_default(size=40), ImageFont.load_default(size=20)
    left, right = 48, width - 48

    draw.text((left, 48), "INVOICE", fill="black", font=title)
    draw.text((right, 58), f"No. {2000 + number}", fill="black", font=body, anchor="ra")
    draw.rectangle((left, 120, right, 126), fill="navy")
    for i, line in enumerate(("North Lake Paper House", "9 Bridge Street", "River Town")):
        draw.text((left, 150 + 28 * i), line, fill="black", font=body)

    top = 290
    draw.rectangle((left, top, right, top + 36), fill="lightgray")
    for x, name, anchor in ((left + 8, "Item", "la"), (right - 8, "Price", "ra")):
        draw.text((x, top + 6), name, fill="black", font=body, anchor=anchor)
    total = 0
    for i in range(7):
        y = top + 46 + 40 * i
        price = pick.randint(3, 900)
        total += price
        draw.text((left + 8, y), f"{pick.randint(1, 12)} x {pick.choice(GOODS)}", "black", body)
        draw.text((right - 8, y), f"{price}.00", "black", body, anchor="ra")
        draw.line((left, y + 32, right, y + 32), fill="lightgray")
    y = top + 46 + 40 * 7 + 10
    draw.text((right - 8, y), f"Total  {total}.00", fill="darkred", font=title, anchor="ra")
    draw.text((left, height - 70), "Please pay within 30 days.", fill="gray", font=body)
    return page
