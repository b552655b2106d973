"""Machine code of every kernel of every installed fivefold package, made and read without a GPU.

Data flows down: ``gather`` runs ops on ``meta`` tensors and turns their launches into ``builds``;
``pool`` gives those to processes, where ``compile`` makes machine code and ``sass`` reads it into
``records``; ``compare`` holds records against the laws and against a table of earlier ones.
"""
