"""The papers behind the architectures and objectives, as BibTeX, and behind ways to balance classes."""

from typing import NamedTuple


class Paper(NamedTuple):
    """A publication with an entry on arXiv."""

    key: str
    authors: str
    title: str
    venue: str
    year: int
    arxiv: str

    def bibtex(self) -> str:
        return (
            f"@inproceedings{{{self.key},\n"
            f"  title = {{{self.title}}},\n"
            f"  author = {{{self.authors}}},\n"
            f"  booktitle = {{{self.venue}}},\n"
            f"  year = {{{self.year}}},\n"
            f"  url = {{https://arxiv.org/abs/{self.arxiv}}}\n"
            "}"
        )


PAPERS = {
    "vit": Paper(
        "dosovitskiy2021image",
        "Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and others",
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        "International Conference on Learning Representations",
        2021,
        "2010.11929",
    ),
    "deit": Paper(
        "touvron2021training",
        "Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and others",
        "Training data-efficient image transformers & distillation through attention",
        "International Conference on Machine Learning",
        2021,
        "2012.12877",
    ),
    "deit3": Paper(
        "touvron2022deit3",
        "Touvron, Hugo and Cord, Matthieu and J{\\'e}gou, Herv{\\'e}",
        "DeiT III: Revenge of the ViT",
        "European Conference on Computer Vision",
        2022,
        "2204.07118",
    ),
    "pvt": Paper(
        "wang2021pyramid",
        "Wang, Wenhai and Xie, Enze and Li, Xiang and others",
        "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
        "International Conference on Computer Vision",
        2021,
        "2102.12122",
    ),
    "swin": Paper(
        "liu2021swin",
        "Liu, Ze and Lin, Yutong and Cao, Yue and others",
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        "International Conference on Computer Vision",
        2021,
        "2103.14030",
    ),
    "masked_autoencoder": Paper(
        "he2022masked",
        "He, Kaiming and Chen, Xinlei and Xie, Saining and others",
        "Masked Autoencoders Are Scalable Vision Learners",
        "Conference on Computer Vision and Pattern Recognition",
        2022,
        "2111.06377",
    ),
    "masked_image_modeling": Paper(
        "xie2022simmim",
        "Xie, Zhenda and Zhang, Zheng and Cao, Yue and others",
        "SimMIM: a Simple Framework for Masked Image Modeling",
        "Conference on Computer Vision and Pattern Recognition",
        2022,
        "2111.09886",
    ),
}

# What may be done about rare classes in training, with its strength.
REBALANCING = {
    "logit_adjustment": "[logit adjustment](https://arxiv.org/abs/2007.07314) of strength {:g}",
    "class_weight_beta": "[weights of classes by their effective number](https://arxiv.org/abs/1901.05555), beta {:g}",
    "class_balanced_sampling": "drawing every class equally often",
}
