"""LoRA on a multimodal model, step by step, wherever its conversations come from. Knows nothing of Ray.

talks.py reads the conversations of a corpus and finds what is wrong with them, parts.py decides which are trained
on, pictures.py readies their images, encoding.py makes token ids and batches of them; learner.py is the model with
what is learnt, and the loss; trainer.py takes the steps; figures.py measures, card.py tells, proof.py scores.
"""
