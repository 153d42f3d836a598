# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer made from a word list, so that no test downloads one."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors as post_processors

WORDS = tuple(
    """
    a about above across after again air all along also always am an and animal answer any are
    area around as ask at away back bag ball bank bar base be because bed been before began behind
    below best better between big bird black blue boat body book both bottom box boy bread bridge
    bright brown building bus but by call came can car card cat chair change child circle city
    clear clock close cloud coat cold color come corner could count country cover cup cut dark day
    deep describe did different dog door down draw dress drive each ear early earth east edge egg
    eight end even every eye face fall family far fast father feet few field find fire first fish
    five floor flower fly food foot for form found four from front full game garden gave girl give
    glass go gold good grass gray great green ground group had hair half hand has hat have he head
    hear help her here high hill him his hold home horse hot hour house how i ice if image in into
    is it its jump just keep key kind king know lake land large last late lead leaf left leg less
    letter life light like line list little long look low made main make man many map mark may me
    mean men middle milk mind money month moon more morning most mother mountain mouth move much
    music must my name near need never new next night nine no north nose not now number object
    ocean of off often old on once one only open or orange other our out over own page paint pair
    paper park part people person phone picture piece place plain plane plant plate play point
    pond pool purple put question quiet rain ran read red rest right river road rock roof room
    round run said same sand saw say scene school sea seat second see seen seven shape she ship
    shirt shoe short show side sign silver sit six sky small snow so some son song soon sound south
    space square stand star start step still stone stop store street strong such summer sun table
    tail take talk tall tell ten than that the their them then there these they thing think this
    those three through time to today together too took top toward town train tree triangle truck
    turn two type under until up upon us use very video view visible voice walk wall want warm was
    watch water way we week well went were west what wheel when where which while white who why
    wide wild will wind window winter with woman wood word work world would write yard year yellow
    yes you young your
    """.split()  # noqa: SIM905
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(
    words: tuple[str, ...], extra: tuple[str, ...] = (), bare: tuple[str, ...] = ()
) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer with every byte, ``words`` and SPECIAL_TOKENS, and the ids of the words.

    Each word is one token with its leading space; the ids are those tokens', in the order given.
    ``extra`` are further special tokens, of families that have their own; ``bare`` are words that
    are one token without a leading space.
    """
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: dict[tuple[str, str], None] = {}
    for merged, letters in [("Ġ", word) for word in words] + [(w[0], w[1:]) for w in bare]:
        for letter in letters:
            merges.setdefault((merged, letter))
            merged += letter
            vocab.setdefault(merged, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *extra)]
    )
    return tokenizer, [vocab["Ġ" + word] for word in words]
