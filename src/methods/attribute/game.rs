//! The input as a game: which features are there, and what F is then.

use super::{baseline::Compared, features::Features};
use crate::{
    engine::EngineError,
    methods::subject::{Show, Subject},
};

/// Which players are there.
pub(super) type Coalition = Vec<bool>;

/// Players are the features of which something can be replaced. The others are always there, and count for nothing.
#[derive(Clone, Debug)]
pub(super) struct Game {
    compared: Compared,
    /// Number of the feature of each player.
    players: Vec<usize>,
    /// The player that each unit belongs to.
    player_of: Vec<Option<usize>>,
    features: usize,
}

impl Game {
    /// # Errors
    /// When nothing can be replaced.
    pub(super) fn new(compared: Compared, features: &Features) -> Result<Self, EngineError> {
        let mut player_of = vec![None; compared.units()];
        let mut players = Vec::new();
        for (feature, units) in features.units().iter().enumerate() {
            if units.iter().any(|u| compared.replaces(*u)) {
                for unit in units {
                    player_of[*unit] = Some(players.len());
                }
                players.push(feature);
            }
        }
        if players.is_empty() {
            return Err(EngineError::invalid(
                "input",
                "has nothing that could be replaced: it is made of special tokens only",
            ));
        }
        Ok(Self {
            compared,
            players,
            player_of,
            features: features.len(),
        })
    }

    /// How many players.
    pub(super) fn players(&self) -> usize {
        self.players.len()
    }

    /// What replaces those that are gone.
    pub(super) fn compared(&self) -> &Compared {
        &self.compared
    }

    /// Whether a unit is gone.
    pub(super) fn is_gone(&self, coalition: &Coalition, unit: usize) -> bool {
        self.player_of[unit].is_some_and(|p| !coalition[p])
    }

    /// F of each coalition, one after the other.
    pub(super) async fn play(
        &self,
        subject: &mut Subject,
        coalitions: &[Coalition],
        each: impl FnMut(&Subject, usize, f64),
    ) -> Result<(), EngineError> {
        let show = self.compared.show(Show::objective());
        let info = subject.handle.info().clone();
        let extent = (coalitions.len(), self.compared.row_bytes());
        subject
            .values(
                &show,
                extent,
                |rows| {
                    let gone = |row: usize, unit| self.is_gone(&coalitions[row], unit);
                    self.compared.inputs(&info, rows, gone)
                },
                each,
            )
            .await
    }

    /// F of each coalition.
    pub(super) async fn values(
        &self,
        subject: &mut Subject,
        coalitions: &[Coalition],
    ) -> Result<Vec<f64>, EngineError> {
        let mut values = vec![0.0; coalitions.len()];
        self.play(subject, coalitions, |_, row, value| values[row] = value)
            .await?;
        Ok(values)
    }

    /// F of the baseline.
    pub(super) async fn baseline(&self, subject: &mut Subject) -> Result<f64, EngineError> {
        let nobody = vec![vec![false; self.players()]];
        Ok(self.values(subject, &nobody).await?[0])
    }

    /// Scores of players as scores of features.
    pub(super) fn scores(&self, of_players: &[f64]) -> Vec<f64> {
        let mut scores = vec![0.0; self.features];
        for (player, score) in self.players.iter().zip(of_players) {
            scores[*player] = *score;
        }
        scores
    }

    /// The feature of each player.
    pub(super) fn feature(&self, player: usize) -> usize {
        self.players[player]
    }
}
