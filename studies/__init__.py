"""The evidence: is it self-refinement? One file a question; `python -m studies NAME` answers it.

    rollout      is the rollout used, or is the prompt enough?
    maturity     does it survive a good backbone?
    window       is it global: how far does a refiner have to see?
    choice       when is the written image needed?
    decoding     what can be had by decoding with more care?
    main         is it worth more than what else could be done?        every method, every control
    positions    does the error build up, and is that taken back?      the paper's Figure 2
    lora         which setting of LoRA is a fair control?
    demos        do more demonstrations help?                          the paper's Figure 3
    backbones    does it work on other backbones?
    data         how many rollouts, how many steps are enough?
    size         how small a refiner is enough?
    reading      what does the refiner have to read?
    passes       does it help to refine again?
    loss         does the loss matter?
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
    numbers(cells) -> dict                  more for the JSON file, if there is more
    CELLS_OF                                instead of `run`: another study, whose cells are shown
"""
