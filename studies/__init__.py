"""The evidence: is it self-refinement? One file a question; `python -m studies NAME` answers it.

    rollout      is the rollout used, or is the prompt enough?
    choice       when is the written image needed?
    maturity     does it survive a good backbone, and rivals of the same cost?
    window       is it global: how far does a refiner have to see?
    positions    where along the sequence?                             the paper's Figure 2
    decoding     what can be had by decoding with more care?
    data         how many rollouts, how many steps are enough?
    size         how small a refiner is enough?
    backbones    does it work on other backbones?
    demos        do more demonstrations help?                          the paper's Figure 3
    probe        how far does one wrong token run, and how much of it is taken back?
    generalize   does it correct tasks and data that it has not seen?
    speed        what does all this cost, and is the code fast?
    adversarial  does the tokenizer need the adversarial loss?

A study is a module with a few plain names, which `studies/__main__.py` uses:

    MINUTES             of a cell on 2 CPU cores, about: for the time left
    SETTINGS            a list of dictionaries: for each seed there is one cell for each of them
    run(setup, seed, **setting) -> dict     trains or measures one cell, gives plain numbers
    show(cells) -> str                      the table of all cells
    plot(path, cells)                       the picture
"""
